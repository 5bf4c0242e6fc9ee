"""Trains a diffusion model on the digits 0 to 4, then adapters that turn it into one of 5 to 9.

Run as `python -m examples.digits_diffusion`; the pictures go to out/demo.
"""

import sys
import time

import jax
import numpy as np
from flax import nnx

from automagic_optax import memory_report
from examples.digits_diffusion import data, diffusion, figures, judge, optimizers, tables, training
from examples.digits_diffusion.model import Denoiser, with_adapters
from examples.digits_diffusion.settings import Settings


def main(settings: Settings) -> int:
    started = time.perf_counter()
    print(
        "Trains a diffusion model on the digits 0 to 4, then adapters that turn it into one of 5 to 9: with this "
        f"optimizer\nfrom a rate of {settings.starting_rate:g}, and with AdamW at each of {len(settings.adamw_rates)} "
        "rates.  Two minutes on two cores that do nothing else.\n",
        flush=True,
    )
    settings.output.mkdir(parents=True, exist_ok=True)
    base_key, tuning_key, held_out_key, sample_key = jax.random.split(jax.random.key(settings.seed), 4)
    digits = data.load()
    old = digits.only(data.OLD_CLASSES)
    new, held_out_digits = data.split(digits.only(data.NEW_CLASSES), settings.held_out_share, settings.seed)
    held_out = training.held_out_batch(held_out_digits.images, settings.held_out_noises, held_out_key)

    print(f"A base model on {len(old.images)} real images of the digits 0 to 4:")
    base = training.train_base(old.images, settings, base_key)

    print(
        f"\nAdapters of rank {settings.rank} on {len(new.images)} real images of 5 to 9; "
        f"{len(held_out_digits.images)} more are held out."
    )
    recipes = [optimizers.automagic(settings)]
    recipes += [optimizers.adamw(rate, settings) for rate in settings.adamw_rates]
    ours, *adamw = (training.fine_tune(base, recipe, new.images, held_out, settings, tuning_key) for recipe in recipes)

    classifier, accuracy = judge.train_classifier(digits)
    samples = [draw(model, settings, sample_key) for model in (base, ours.model)]
    before, after = (judge.judge(classifier, images) for images in samples)

    print()
    tables.show_runs(ours, adamw, settings.starting_rate)
    memory = memory_report(ours.optimizer.opt_state)
    tables.show_memory(fresh_memory(base, recipes[0], settings), memory)
    tables.show_counts(before, after, accuracy)

    bands = [
        (f"Before the fine-tuning, trained on 0 to 4: {before.new_share:.1%} called 5 to 9", samples[0]),
        (f"After the fine-tuning, trained on 5 to 9: {after.new_share:.1%} called 5 to 9", samples[1]),
        ("Real digits 5 to 9", new.images),
    ]
    figures.save_samples(bands, settings.output / "samples.png")
    figures.save_losses(ours, adamw, settings.output / "loss.png")
    print(f"Wrote {settings.output}/samples.png and {settings.output}/loss.png.")
    print(f"Took {time.perf_counter() - started:.0f} s.\n")
    for sentence in tables.seen(ours, adamw, settings, memory, before, after):
        print(sentence)

    problems = judge.failures(before, after, settings)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


def draw(model: Denoiser, settings: Settings, key: jax.Array) -> np.ndarray:
    """Samples from the model, from the same noise for the same key."""
    sample = nnx.jit(diffusion.sample, static_argnames=("count", "pixels", "steps"))
    images = sample(model, key, count=settings.samples, pixels=data.PIXELS, steps=settings.sampling_steps)
    if not np.isfinite(images).all():
        sys.exit("FAILED: the model's samples are not finite")
    return data.to_grey_levels(np.asarray(images))


def fresh_memory(base: Denoiser, recipe: optimizers.Recipe, settings: Settings) -> dict[str, object]:
    """The memory report of the state at the start, when it still holds what only the warm-up needs."""
    model = with_adapters(base, settings.rank, nnx.Rngs(0))
    return memory_report(nnx.Optimizer(model, recipe.tx, wrt=nnx.LoRAParam).opt_state)


if __name__ == "__main__":
    sys.exit(main(Settings()))
