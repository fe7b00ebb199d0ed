"""Self-distillation: the model's own responses to prompts, which OPUT learns from (paper, 4.1).

Responses are decoded at a conservative threshold. Those that did not end by themselves are set
apart, and nothing filters for correctness unless that is asked for (A22 in docs/paper.md).
"""
