"""Replicas of a model under Ray, for `dmax distill --ray` and `dmax eval --ray`.

`cluster` says where replicas run and how many fit, `workers` what one of them does, `pool` sends
chunks of prompts through them with Ray Data, and `replicas` puts that behind the protocols of
evaluation and distillation. The process of the command needs no GPU and loads no model.
"""
