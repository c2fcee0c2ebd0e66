"""The eight benchmarks on which the DoRA paper reports VL-BART (Tables 2 and 3), each scored as its own tool does it.

Importing this package must stay cheap (no torch, no metric library): listing the evaluators imports it.
"""

from pipelines.video.evaluators import captions, gqa, nlvr2, questions, vqa

__all__ = ["captions", "gqa", "nlvr2", "questions", "vqa"]
