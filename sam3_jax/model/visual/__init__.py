"""Visual prompts: a second neck on the trunk, and a head that segments what points, a box or an
earlier mask point at (the task of Segment Anything; Meta's SAM 3 does it with SAM 2's head, Ravi et
al. 2024, arXiv:2408.00714)."""
