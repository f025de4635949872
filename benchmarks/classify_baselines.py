"""What documents can be told by without a network: TF-IDF with a linear SVM, and the label prior.

    python benchmarks/classify_baselines.py --config=configs/classify.py:quick --out=results.json

Reads the corpus, labels, splits and measures of that configuration, whatever follows as --config.key=value included.
The text is the token cache's, decoded: whole documents, and what a model with that block reads of them. Terms are
words and pairs of words in at least two training documents, weighted (1 + log count) x inverse document frequency; one
linear SVM a label (scikit-learn's LinearSVC, one against the rest), its C the best of C_TRIED on the validation split;
as for the network, the threshold is the one of the best micro F1 there. The prior scores each label by its frequency.
"""

import argparse
import ast
import json
import time
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from common import save_results
from ml_collections import ConfigDict

from altgrad_jax.config import check_keys, load_config, validate
from altgrad_jax.data.cache import TokenCache
from altgrad_jax.data.corpus import open_corpus
from altgrad_jax.multilabel import best_threshold, measures
from altgrad_jax.task import Classification, make_task

C_TRIED = (0.1, 0.3, 1.0, 3.0, 10.0)
NGRAMS = (1, 2)
MAX_TERMS = 200_000


def main() -> None:
    """Prints the measures and saves them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/classify.py:quick")
    parser.add_argument("--out", help="write the results here, as JSON")
    arguments, changes = parser.parse_known_args()
    results = baselines(configured(arguments.config, changes))
    print(json.dumps(results, indent=2))
    save_results(arguments.out, results)


def configured(file: str, changes: list[str]) -> ConfigDict:
    """A configuration with --config.key=value options applied."""
    config = load_config(file)
    pairs = [change.removeprefix("--config.").split("=", 1) for change in changes]
    check_keys(config, [key for key, _ in pairs])
    config.update_from_flattened_dict({key: _typed(value) for key, value in pairs})
    validate(config)
    return config


def _typed(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def baselines(config: ConfigDict) -> dict[str, Any]:
    """Measures of the label prior, and of the SVM on whole documents and on their first block."""
    cache = open_corpus(config)
    task = make_task(config, cache)
    assert isinstance(task, Classification)
    splits = ("train", "validation", "test")
    targets = {split: task.label_set.targets(split) for split in splits}
    prior = {split: np.broadcast_to(task.label_set.log_odds(), y.shape) for split, y in targets.items()}
    results: dict[str, Any] = {"data": {"sha256": cache.sha256, "labels": task.labels, "splits": task.counts()}}
    results["label prior"] = judged(targets, prior)
    block = config.model.block_size
    for name, tokens in (("whole documents", None), (f"first {block} tokens", block)):
        texts = {split: documents(cache, split, tokens) for split in splits}
        results[f"TF-IDF + SVM, {name}"] = svm(texts, targets)
    return results


def documents(cache: TokenCache, split: str, tokens: int | None) -> list[str]:
    """The texts of a split, or what their first tokens stand for."""
    tokenizer, flat, starts = cache.tokenizer(), cache.tokens(split), cache.document_starts(split)
    ends = np.append(starts[1:], len(flat)) - 1
    stops = ends if tokens is None else np.minimum(ends, starts + tokens)
    return [tokenizer.decode(flat[start:stop].tolist()) for start, stop in zip(starts, stops, strict=True)]


def judged(targets: dict[str, npt.NDArray], logits: dict[str, npt.NDArray], margins: bool = False) -> dict[str, Any]:
    """Measures of both splits at the validation split's threshold, a logit or margin; margins have no loss."""
    threshold = best_threshold(targets["validation"], logits["validation"])
    found = {split: measures(targets[split], logits[split], threshold) for split in ("validation", "test")}
    if margins:
        for of_split in found.values():
            del of_split["loss"]
    return {"val": found["validation"], "test": found["test"], "threshold": threshold}


def svm(texts: dict[str, list[str]], targets: dict[str, npt.NDArray]) -> dict[str, Any]:
    """The best of C_TRIED on the validation split."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.svm import LinearSVC

    began = time.monotonic()
    terms = TfidfVectorizer(ngram_range=NGRAMS, min_df=2, max_features=MAX_TERMS, sublinear_tf=True)
    matrices = {"train": terms.fit_transform(texts["train"])}
    matrices |= {split: terms.transform(texts[split]) for split in ("validation", "test")}
    tried = {}
    for c in C_TRIED:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a label of no training document gets a constant margin
            model = OneVsRestClassifier(LinearSVC(C=c)).fit(matrices["train"], targets["train"].astype(int))
            margins = {split: model.decision_function(matrices[split]) for split in ("validation", "test")}
        tried[c] = judged(targets, {split: m.reshape(len(m), -1) for split, m in margins.items()}, margins=True)
    best = max(tried, key=lambda c: tried[c]["val"]["micro_f1"])
    return tried[best] | {"C": best, "terms": len(terms.vocabulary_), "seconds": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    main()
