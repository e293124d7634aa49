"""Visual prompts: a second neck on the trunk, and a head that segments the object given by points,
a box or an earlier mask (the task of Segment Anything; Meta's SAM 3 uses SAM 2's head, Ravi et al.
2024, arXiv:2408.00714)."""
