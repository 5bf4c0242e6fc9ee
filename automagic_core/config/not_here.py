"""Keywords of the original optimizer, and of others, that are no fields here, and what to use instead."""

from __future__ import annotations

from collections.abc import Mapping

INSTEAD: Mapping[str, str] = {
    "lr_bump": "the search takes steps of its own: search_gain says how fast the rate rises, 0 switches the search off",
    "eps": "leave it out: √v has a floor that nobody needs to set; confidence_floor is the one that changes the step",
    "clip_threshold": "use update_clip, which bounds each element of the normalized gradient and not their mean square",
    "eta": "leave it out: lr_mask_gain is what gives rows rates of their own",
    "beta1_decay": "leave it out: the first number of betas holds for the whole run",
    "context_window": "leave it out: the search looks at every step of the warm-up, and warmup_steps says how many",
    "adaptation_rate": "use torque_decay, a number in [0, 1)",
    "came": "leave it out: confidence is always on; confidence_floor says how far it may lengthen a step",
    "full_finetune": "leave it out: one optimizer does both; lora_rank_penalty acts on marked adapters alone",
    "detail_preservation": "lower edge_penalty and frequency_penalty, the less they are the more detail stays",
    "fused_adam": "leave it out: arrays of one kind are always computed together",
}
"""What to use instead, for each keyword; docs/original.md says more."""
