"""The concepts of LexGLUE's EUR-LEX task: 100 of the 127 of EuroVoc's second level that its records carry.

The list and its order are those of the benchmark's own loader: `datasets/lex_glue/lex_glue.py` of huggingface/datasets
at commit 9a9df85 ("Fix bug with labels of eurlex config of lex_glue dataset", 2022-09-30, by the benchmark's author),
which reads the archive whose SHA-256 is in `eurlex_corpora.LEXGLUE`. As there, labels of the other 27 are left out.
"""

from altgrad_jax.errors import UserError

SECOND_LEVEL = range(100163, 100290)
_LEFT_OUT = {
    *(100164, 100165, 100166, 100167, 100178, 100181, 100182, 100188, 100203, 100208, 100209, 100210, 100211, 100213),
    *(100216, 100217, 100218, 100219, 100225, 100228, 100236, 100251, 100267, 100286, 100287, 100288, 100289),
}
LABELS = tuple(str(concept) for concept in SECOND_LEVEL if concept not in _LEFT_OUT)


def split_labels(labels: tuple[str, ...], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A record's labels that are the benchmark's, and those of the second level that are not.

    Raises:
      UserError: a label is no concept of the second level at all; names the record.
    """
    for label in labels:
        if not (label.isascii() and label.isdecimal() and str(int(label)) == label and int(label) in SECOND_LEVEL):
            raise UserError(
                f"{where}: label {label!r} is no concept of LexGLUE, whose records carry EuroVoc ids from"
                f" {SECOND_LEVEL[0]} to {SECOND_LEVEL[-1]} (not the places of labels in a list)"
            )
    chosen = frozenset(LABELS)
    return tuple(one for one in labels if one in chosen), tuple(one for one in labels if one not in chosen)
