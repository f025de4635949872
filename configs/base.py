"""Every setting and its default: the published BF16 baseline (6 layers x 384, 30 M parameters, 2000 steps).

An experiment is a small file beside this one that starts from `get_config()` and changes what it is about. Units:
steps are optimizer steps, batches are counted in windows of `model.block_size` tokens.
"""

from ml_collections import ConfigDict, config_dict


def get_config(variant: str = "") -> ConfigDict:
    """The defaults; `variant="quick"` is the same experiment small enough for a laptop CPU."""
    config = ConfigDict()
    config.seed = 42
    config.task = "lm"  # lm (the next token) | classify (a document's labels); docs/classify.md

    config.model = ConfigDict()
    config.model.n_layer = 6
    config.model.n_head = 6
    config.model.n_embd = 384
    config.model.block_size = 256
    config.model.vocab_size = 50257
    config.model.dropout = 0.0
    config.model.bias = False
    config.model.tie_embeddings = True
    config.model.gelu = "tanh"  # tanh (OpenAI's GPT-2, Hugging Face's) | exact (nanoGPT's, AltGrad's)
    config.model.attention = "auto"  # auto | xla | cudnn

    config.data = ConfigDict()
    # eurlex (the one that is prepared) | eurlex57k | lexglue | eurlex-local | embedded (invented acts, which need no
    # download) | files | auto: eurlex where it is prepared, else, for a small vocabulary, embedded
    config.data.name = "eurlex"
    config.data.path = config_dict.placeholder(str)  # files: a .txt / .jsonl / .jsonl.gz file or a folder of them
    config.data.cache = config_dict.placeholder(str)  # a token cache's folder: trained from as it is, nothing else read
    config.data.data_dir = "~/.cache/altgrad_jax"  # prepared corpora and token caches
    config.data.tokenizer = "auto"  # auto (gpt2 if its file is here, else bpe) | bpe | bytes | gpt2
    config.data.vocab_size = 0  # entries the tokenizer may use; 0: as many as the model has

    config.classify = ConfigDict()
    config.classify.min_documents = 10  # labels of at least so many training documents; 0: the data set's own list
    config.classify.long_documents = "cut"  # cut (to the first block_size tokens) | split (into windows)
    config.classify.max_windows = 8  # split: most windows of a document, its first ones; 0: all
    config.classify.positive_weight = 1.0  # of a label's presence in the loss; 0: balanced, at most 16

    config.train = ConfigDict()
    config.train.steps = 2000
    config.train.batch_size = 12  # windows per step over all devices and hosts
    config.train.grad_accumulation = 1  # microbatches a step's batch is cut into
    config.train.steps_per_dispatch = 1  # steps in one program, for models faster than their host; see docs/gpu.md
    config.train.log_every = 1
    config.train.eval_every = 100
    config.train.eval_batches = 20  # validation windows are eval_batches * batch_size, the same at every evaluation
    config.train.loss_scale = "1"  # factor on the gradients while they are rounded: a number, or "dynamic"
    # none | block: recompute a block's activations backward, which saves memory and, on a GPU, costs a forward pass
    config.train.remat = "none"
    config.train.loss_chunk = 0  # tokens whose logits exist at once, per device; 0: 256 on a CPU, else 4096

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw | manifold_adamw | grid | madam | adamw_sr; docs/optimizers.md
    config.optimizer.learning_rate = 6e-4  # in the optimizer's own unit: see docs/optimizers.md
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"  # cosine | linear | constant
    config.optimizer.decay_steps = 0  # where the schedule reaches its floor; 0: train.steps
    config.optimizer.min_lr_ratio = 0.1
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.1
    config.optimizer.grad_clip = 1.0  # global norm; 0: off
    config.optimizer.placement = "after"  # manifold_adamw: stiffness before | after Adam's moments, or off
    config.optimizer.form = "relative"  # manifold_adamw, after: relative | ulps
    config.optimizer.max_stiffness = 1e6  # manifold_adamw, before
    config.optimizer.momentum = 0.9  # grid
    config.optimizer.rung_clip = 10.0  # grid: most rungs a weight moves in a step
    config.optimizer.update_clip = 10.0  # madam: bound on the normalised gradient
    config.optimizer.max_scale = 3.0  # madam: bound on the weights, in units of their initial root mean square
    config.optimizer.other_learning_rate = 6e-4  # grid, madam, manifold_adamw in ulps: AdamW's, of all other parameters
    config.optimizer.weights = "float32"  # how parameters are stored: float32 | bfloat16 | format (adamw_sr, grid)
    config.optimizer.moments = "float32"  # adamw_sr: float32 | 8bit

    config.precision = ConfigDict()
    config.precision.compute = "bfloat16"  # bfloat16 | float32: activations; operands of layers that no rule quantises
    config.precision.rules = ()  # ((pattern of layer paths, recipe), ...): the first match decides
    config.precision.backend = "auto"  # auto | native | emulated
    config.precision.kernel = "xla"  # xla | pallas: what multiplies natively two operands of one FP8 type; docs/gpu.md
    # pallas: a table of tiles that benchmarks/tune_kernel.py has measured; none: by the products' sizes
    config.precision.kernel_tiles = config_dict.placeholder(str)
    config.precision.strict = False  # refuse to run where a quantised layer is not multiplied in 8 bits

    config.diagnostics = ConfigDict()
    config.diagnostics.quant_every = 100  # steps between counts of overflow, underflow and codes used; 0: never
    config.diagnostics.shadow_every = 100  # steps between comparisons with the float32 gradient; 0: never
    # More questions, as "name:steps between": gradients, weights, spectra, curvature, sensitivity; docs/diagnostics.md
    config.diagnostics.questions = ("gradients:100", "weights:100", "spectra:100")
    config.diagnostics.windows = 0  # windows of each device's batch that are measured; 0: all
    config.diagnostics.tokens = 64  # tokens of a window, one a device, that curvature and sensitivity look at
    config.diagnostics.lanczos_steps = 6  # of curvature

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 100
    config.checkpoint.max_to_keep = 3
    config.checkpoint.restore_from = config_dict.placeholder(str)  # DIR[@STEP]: start from another run's weights

    config.stability = ConfigDict()
    config.stability.nan_patience = 10  # consecutive steps of NaN or Inf loss before the run stops as diverged
    config.stability.skip_nonfinite = False  # leave out updates of steps with a loss or gradient that is not finite
    config.stability.relative_clip = False  # optimizer.grad_clip relative to the range of each layer's format
    config.stability.rewinds = 0  # how often a diverged run goes back to its last checkpoint and on with later data
    # A layer that has failed goes on in the next of these formats with more mantissa bits; see docs/stability.md.
    config.stability.fallback = False
    config.stability.fallback_formats = ("e7m0", "e6m1", "e5m2", "e4m3", "e3m4", "e2m5", "e1m6", "e0m7")
    config.stability.fallback_patience = 3  # consecutive steps left out (skip_nonfinite) before it does
    config.stability.fallback_stall = 0.0  # stall ratio (question "weights") above which it does; 0: never

    config.tracking = ConfigDict()
    config.tracking.wandb = "offline"  # offline | online | disabled
    config.tracking.project = "altgrad"
    config.tracking.entity = config_dict.placeholder(str)
    config.tracking.name = "baseline"
    config.tracking.tags = ()

    config.parallel = ConfigDict()
    config.parallel.devices = 0  # local devices to use; 0: all
    config.parallel.coordinator = config_dict.placeholder(str)  # host:port of process 0, to train in several processes
    config.parallel.hosts = 1  # how many processes
    config.parallel.host = 0  # which of them this is
    config.parallel.timeout = 60.0  # seconds for all to join, and after which one that is not heard of is gone

    config.runtime = ConfigDict()
    config.runtime.compilation_cache = config_dict.placeholder(str)  # folder of compiled programs
    config.runtime.peak_tflops = 0.0  # 16-bit peak of one device, for train/mfu; 0: the data sheet's, where it is known
    config.profile = False  # trace steps 6 to 10 of the session into WORKDIR/profile, for XProf and Perfetto

    if variant == "quick":
        _make_quick(config)
    elif variant:
        raise ValueError(f"unknown variant {variant!r}: this config has 'quick' and the plain form")
    return config.lock()


def _make_quick(config: ConfigDict) -> None:
    """Shrinks every size so that the run takes about a minute on two CPU cores."""
    config.data.name = "auto"
    config.model.update(n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=1024)
    config.train.update(steps=300, batch_size=16, eval_every=50, eval_batches=8)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=40)
