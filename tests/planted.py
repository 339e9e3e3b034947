"""
Does the suite see faults? This plants twelve of them, one line each, in a copy of the repository, one at a time, and
runs the few tests that should see it. They must pass without any fault, and fail with it, by an assertion.

    python tests/planted.py
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = (".git", ".venv", ".*_cache", "__pycache__", "outputs", "srpo-wan")
TRAINER = "train_srpo_wan_t2i.py"


class Fault(NamedTuple):
    """A line of a file, without its indentation, the line that takes its place, and the tests that should see it."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def lines(self, folder):
        """The lines of the file in this copy of the repository, and the indices of those that are the old line."""
        lines = Path(folder, self.file).read_text().splitlines()
        return lines, [index for index, line in enumerate(lines) if line.strip() == self.old]


FAULTS = [
    Fault(
        "the sign of a branch: the graded step goes the other way",
        TRAINER,
        "x = x + (end - start) * predict_velocity(x, sigma_from)",
        "x = x + (start - end) * predict_velocity(x, sigma_from)",
        ("unit/test_direct_align.py::test_slope_of_the_recovered_latents_in_the_velocity",),
    ),
    Fault(
        "swapped words: the denoise branch is drawn to the negative one",
        TRAINER,
        'swap = torch.full_like(discount, name == "inversion")',
        'swap = torch.full_like(discount, name == "denoise")',
        ("unit/test_graded_pass.py::test_published_captions",),
    ),
    Fault(
        "wrong noise levels: the step starts where it should end",
        TRAINER,
        "x0_hat = direct_align_step(velocity, x0, noise, sigma_from, sigma_to)",
        "x0_hat = direct_align_step(velocity, x0, noise, sigma_to, sigma_from)",
        ("unit/test_graded_pass.py::test_the_transformer_sees_each_branch_at_its_own_noise_level",),
    ),
    Fault(
        "the index of a discount: the inversion branch reads at the position of the other",
        TRAINER,
        "read_at = [each[2][index] for each in levels]",
        "read_at = [each[2][0] for each in levels]",
        ("unit/test_plan.py::test_sigmas_and_discounts_follow_the_position_of_each_sample",),
    ),
    Fault(
        "accumulated gradients are summed, not averaged",
        TRAINER,
        "accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))",
        "accelerator.backward(loss * accelerator.gradient_accumulation_steps)",
        ("unit/test_update.py::test_accumulated_rollouts_make_the_update_of_one_large_rollout",),
    ),
    Fault(
        "latents are not brought back to the range of the VAE",
        TRAINER,
        "x = decoder.conv_in(vae.post_quant_conv((latents * std + mean).to(vae.dtype)))",
        "x = decoder.conv_in(vae.post_quant_conv((latents / std + mean).to(vae.dtype)))",
        ("unit/test_vae.py::test_pixels_equal_those_of_the_vae",),
    ),
    Fault(
        "the sign of guidance",
        TRAINER,
        "velocity = unconditional + guidance_scale * (conditional - unconditional)",
        "velocity = unconditional + guidance_scale * (unconditional - conditional)",
        ("unit/test_rollout.py::test_rollout_paints_the_latents_of_the_pipeline",),
    ),
    Fault(
        "no gradient reaches the transformer",
        TRAINER,
        "pixels, saturated = decode_latents(models.vae, x0_hat)",
        "pixels, saturated = decode_latents(models.vae, x0_hat.detach())",
        ("unit/test_graded_pass.py::test_only_the_transformer_gets_gradients_and_all_of_it_does",),
    ),
    Fault(
        "the image is recovered with another noise than was injected",
        TRAINER,
        "return (x - end * noise) / (1 - end)",
        "return (x - end * torch.randn_like(noise)) / (1 - end)",
        ("unit/test_direct_align.py::test_an_exact_velocity_recovers_the_clean_latents_exactly",),
    ),
    Fault(
        "the expert is frozen",
        TRAINER,
        "transformer.requires_grad_(args.lora_rank is None)",
        "transformer.requires_grad_(False)",
        ("unit/test_set_up.py::test_without_a_lora_all_weights_are_trained",),
    ),
    Fault(
        "a stale cache gives the features of another text",
        TRAINER,
        "return torch.stack([self.text_cache[text] for text in texts])",
        "return torch.stack([next(iter(self.text_cache.values())) for text in texts])",
        ("unit/test_rewards.py::test_text_features_do_not_depend_on_what_is_encoded_together",),
    ),
    Fault(
        "a resumed run sees the caption before the checkpoint again",
        TRAINER,
        "numbers = range(state.step // reuses * accumulation, args.max_train_steps // reuses * accumulation)",
        "numbers = range(max(0, state.step - 1), args.max_train_steps // reuses * accumulation)",
        ("run/test_resuming.py::test_a_checkpoint_can_be_named_and_the_learning_rate_goes_on",),
    ),
]


def plant(fault, folder):
    """Writes the fault into a copy of the repository."""
    lines, (index,) = fault.lines(folder)
    lines[index] = lines[index].replace(fault.old, fault.new)
    Path(folder, fault.file).write_text("\n".join(lines) + "\n")


def run_tests(tests, folder):
    """Runs tests in a copy of the repository, up to the first that fails. Returns pytest's exit code and output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
    environment = {**os.environ, "COLUMNS": "500", "OMP_NUM_THREADS": "1"}
    command += [f"tests/{test}" for test in tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def sees(tests, folder):
    """Whether one of the tests fails by an assertion: not by an error of Python, and not because it is not there."""
    code, output = run_tests(tests, folder)
    return code == 1 and re.search(r"^FAILED \S+.* - (AssertionError|assert )", output, re.MULTILINE) is not None


def main():
    with tempfile.TemporaryDirectory() as temporary:
        folder, caught = Path(temporary, "repository"), 0
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
        code, output = run_tests(dict.fromkeys(test for fault in FAULTS for test in fault.tests), folder)
        if code != 0:
            sys.exit(f"{output}\nerror: tests fail without any fault.")
        for fault in FAULTS:
            started, whole = time.perf_counter(), Path(folder, fault.file).read_bytes()
            plant(fault, folder)
            seen = sees(fault.tests, folder)
            Path(folder, fault.file).write_bytes(whole)
            caught += seen
            seconds = time.perf_counter() - started
            print(f"{'caught' if seen else 'NOT CAUGHT'} in {seconds:.0f} s: {fault.what}", flush=True)
    print(f"{caught} of {len(FAULTS)} caught")
    sys.exit(caught < len(FAULTS))


if __name__ == "__main__":
    main()
