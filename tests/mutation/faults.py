"""Faults to plant, one at a time: each changes one place of a package, found by its text and not by its file's name."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """One planted fault.

    Attributes:
        name: what goes wrong.
        package: where it is planted.
        old: text that is in that package once.
        new: what takes its place.
        likely: names of test modules that are run first; whether any test notices the fault does not depend on them.
    """

    name: str
    package: str
    old: str
    new: str
    likely: tuple[str, ...]


CORE, TORCH, JAX = "automagic_core", "automagic_torch", "automagic_optax"

FAULTS = (
    Fault(
        "a tie between two codes goes to the lower one",
        CORE,
        "(code % 2 == 1) & (y == above[code])",
        "(code % 2 == 2) & (y == above[code])",
        ("test_codec_in_numpy", "test_layout_change"),
    ),
    Fault(
        "a constant of the random bits has one bit wrong",
        CORE,
        "MIX_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)",
        "MIX_MULTIPLIERS = (0x7FEB352D, 0x846CA68F)",
        ("test_random_bits_core",),
    ),
    Fault(
        "kernels come back from Flax with their first two axes in the wrong order",
        CORE,
        "return (ndim - 1, ndim - 2, *range(ndim - 2))",
        "return (ndim - 2, ndim - 1, *range(ndim - 2))",
        ("test_layout_table", "test_layout_change"),
    ),
    Fault(
        "a transposed residual is rounded again with the signed codebook",
        CORE,
        "coded, absmax = encode(stored, moment_of(name) not in COMPANDED,",
        'coded, absmax = encode(stored, moment_of(name) != "exp_avg_sq",',
        ("test_layout_change",),
    ),
    Fault(
        "the checksum of a neutral file is not compared",
        CORE,
        "found.hexdigest() == digest",
        "len(found.hexdigest()) == len(digest)",
        ("test_state_file",),
    ),
    Fault(
        "the second moment decays with the residual's β",
        TORCH,
        "second_moment(g, squares, old, age, correction2, means, beta2)",
        "second_moment(g, squares, old, age, correction2, means, beta3)",
        ("test_torch_oracle",),
    ),
    Fault(
        "the momentum's bias correction is one step late",
        TORCH,
        'return m / one_minus_power(beta, age), {"exp_avg": m}',
        'return m / one_minus_power(beta, age + 1), {"exp_avg": m}',
        ("test_torch_oracle",),
    ),
    Fault(
        "torque shortens what agrees with the gradient",
        TORCH,
        "tau = s.add(1).div_(2)",
        "tau = s.neg().add_(1).div_(2)",
        ("test_torch_oracle",),
    ),
    Fault(
        "stage 2 allows less than the usual roughness instead of more",
        TORCH,
        "histories[-1] * ((1 + threshold)",
        "histories[-1] * ((1 - threshold)",
        ("test_torch_stages",),
    ),
    Fault(
        "a skipped array ages",
        TORCH,
        'after_step["skipped_steps"] = skipped + (~ok & (skipped < MAX_STEP))',
        'after_step["skipped_steps"] = skipped + (~ok & (skipped < MAX_STEP))\n    after_step["age"] = new["age"]',
        ("test_torch_oracle", "test_torch_citizenship"),
    ),
    Fault(
        "what a scheduler sets is ignored once there is an initial_lr",
        TORCH,
        'lr, ell = self.group["lr"],',
        'lr, ell = self.group.get("initial_lr", self.group["lr"]),',
        ("test_torch_groups", "test_torch_citizenship"),
    ),
    Fault(
        "what an absent array has travelled is forgotten",
        TORCH,
        "call.search(travelled_of_absent(call, self.state, self._owned))",
        "call.search([])",
        ("test_torch_search",),
    ),
    Fault(
        "the rate rises though gradients alternate",
        TORCH,
        "of_agreement * (believed - least)",
        "of_agreement * torch.ones_like(agreement)",
        ("test_torch_search", "test_torch_oracle"),
    ),
    Fault(
        "the rate rises though gradients never agreed",
        TORCH,
        "(-AGREES * peak.abs())",
        "torch.full_like(peak, -1.0)",
        ("test_torch_search", "test_torch_oracle"),
    ),
    Fault(
        "the climb goes on though half of the agreement is gone",
        TORCH,
        " & (agreement >= AGREES * size)",
        "",
        ("test_torch_search", "test_torch_oracle"),
    ),
    Fault(
        "a climb that noise ended stays ended",
        TORCH,
        "again = long & (peak < 0)",
        "again = long & (peak < -2)",
        ("test_torch_search",),
    ),
    Fault(
        "gradients that have grown do not slow the rise",
        TORCH,
        "beyond = beyond * (LARGEST_GROWTH - growth).clamp(0.0, 1.0)",
        "beyond = beyond * 1.0",
        ("test_torch_search",),
    ),
    Fault(
        "gradients that have shrunk ask for as straight a path",
        TORCH,
        "growth.clamp(LEAST_GROWTH, 1.0)",
        "growth.clamp(1.0, 1.0)",
        ("test_torch_search",),
    ),
    Fault(
        "opposing gradients count as much where the path bends",
        TORCH,
        "torch.minimum(agreement, DOUBT * agreement)",
        "agreement",
        ("test_torch_search",),
    ),
    Fault(
        "the walk has other signs at every step",
        TORCH,
        "step = 0 if slot == Slot.walk else self.call.step",
        "step = self.call.step",
        ("test_torch_search", "test_torch_oracle"),
    ),
    Fault(
        "adapters and other arrays of their shape are in one batch",
        TORCH,
        "is_embedding(p), is_lora(p), _processes(p)",
        "is_embedding(p), _processes(p)",
        ("test_torch_gradient_release",),
    ),
    Fault(
        "the mean over rows is that of one process",
        TORCH,
        "sums = summed([_sum(R) for R in statistics.values()], self.split)\n"
        "        return [total / self.plan.shape[0] for total in sums]",
        "return [_sum(R) / R.shape[1] for R in statistics.values()]",
        ("test_torch_processes",),
    ),
    Fault(
        "low-precision weights are rounded to the farther neighbour",
        TORCH,
        "up = r < gaps - low",
        "up = r > gaps - low",
        ("test_torch_codec",),
    ),
    Fault(
        "the residual decays with the second moment's β",
        JAX,
        "r = ema(beta3, _values(",
        "r = ema(beta2, _values(",
        ("test_oracle_single_features", "test_oracle_everything"),
    ),
    Fault(
        "a moment that is never negative is stored with the signed codebook",
        JAX,
        '("ScaleByAdanState", "n"), ',
        "",
        ("test_quantize_state", "test_quantize_state_composed"),
    ),
    Fault(
        "a row statistic is split along axes that it has lost",
        JAX,
        "kept = [entry if n == m else None for entry, n, m in zip(spec, shape, whole, strict=True)]",
        "kept = [entry for entry, n, m in zip(spec, shape, whole, strict=True)]",
        ("test_sharded_types", "test_sharded_update"),
    ),
    Fault(
        "an injected weight decay stays what it was",
        JAX,
        "jnp.asarray(shared.weight_decay, jnp.float32)",
        "jnp.asarray(config.weight_decay, jnp.float32)",
        ("test_optax_inject",),
    ),
    Fault(
        "the ring of norms never uses its last place",
        JAX,
        "(state.norm_position + 1) % NORM_HISTORY",
        "(state.norm_position + 1) % (NORM_HISTORY - 1)",
        ("test_stages_oracle", "test_stage_properties"),
    ),
    Fault(
        "an array votes at its first step",
        JAX,
        "known.mean_square, old.age > 0, plan",
        "known.mean_square, old.age >= 0, plan",
        ("test_oracle_single_features", "test_oracle_everything"),
    ),
    Fault(
        "metrics tell the rate of the step before",
        JAX,
        "NextStep.of(config, lr, int(step))",
        "NextStep.of(config, lr, int(step) - 1)",
        ("test_optax_metrics",),
    ),
    Fault(
        "a skipped array ages",
        JAX,
        "skipped_steps=jnp.minimum(old.skipped_steps, MAX_STEP - 1) + 1)",
        "skipped_steps=jnp.minimum(old.skipped_steps, MAX_STEP - 1) + 1, age=old.age + 1)",
        ("test_bad_gradients", "test_oracle_everything"),
    ),
    Fault(
        "arrays of a batch share the random place of the first axis",
        JAX,
        "stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)",
        "stride = np.uint32(math.prod(shape[axis:]) % 2**32)",
        ("test_random_bits_jax",),
    ),
    Fault(
        "low-precision weights are rounded to the farther neighbour",
        JAX,
        "up = random < gaps - low",
        "up = random > gaps - low",
        ("test_round_parameters",),
    ),
)
