"""Files that the scripts read, as tests write and spoil them."""

import csv
import hashlib
import json

import yaml
from datasets import Dataset
from helpers import PROMPTS
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file


def write_lines(file, *lines):
    file.write_text("\n".join(lines))
    return file


def write_captions(file, column="caption"):
    """Writes `PROMPTS` in the form that the name of a file says; `column` is the key or the column."""
    rows = [{column: caption} for caption in PROMPTS]
    suffix = file.suffix.lower()
    if suffix in (".yaml", ".yml"):
        file.write_text(yaml.safe_dump({"prompts": PROMPTS}))
    elif suffix == ".json":
        file.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8-sig") as stream:  # as a spreadsheet saves it
            writer = csv.DictWriter(stream, [column])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(file)


def edit_weights(file, change):
    """Calls `change` with {name: tensor} of a safetensors file and writes it again."""
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def save_in_shards(file, max_shard_size="20KB"):
    """Saves the weights of a safetensors file as several files and their index instead; returns those files."""
    weights, pattern = load_file(file), f"{file.stem}{{suffix}}.safetensors"
    file.unlink()
    save_torch_state_dict(weights, file.parent, filename_pattern=pattern, max_shard_size=max_shard_size)
    return sorted(file.parent.glob(f"{file.stem}-*.safetensors"))


def renew_checksums(checkpoint):
    """Lists the files of a checkpoint anew, as if it had been saved as it is now; returns it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(checkpoint)}\n" for path in files]
    (checkpoint / "SHA256SUMS").write_text("".join(sorted(lines)))
    return checkpoint
