"""The seven benchmarks of LLaVA-1.5 that the DoRA paper reports (Table 4), each scored as LLaVA's scripts score it.

Importing this package must stay cheap (no torch, no image library): listing the evaluators imports it.
"""

from pipelines.vlm.evaluators import gqa, mmbench, pope, scienceqa, textvqa, vizwiz, vqav2

__all__ = ["gqa", "mmbench", "pope", "scienceqa", "textvqa", "vizwiz", "vqav2"]
