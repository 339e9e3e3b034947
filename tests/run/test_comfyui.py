"""
`scripts/export_checkpoint.py --format comfyui`: one file with the names of the original Wan models, which diffusers'
own converters turn back into what was trained; or a refusal in one line. And the workflow in `docs/`.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from export_checkpoint import main, original_name, parse_args
from helpers import LORA, ROOT, draw, file_hashes, load_lora, load_weights, make_transformer, same_bits, snapshot
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from embed_prompts import WAN_NEGATIVE_PROMPT


A14B = ROOT / "tests/fixtures/wan2.2-t2v-a14b"


def export(source, output_dir, *flags):
    """Exports for ComfyUI; returns the path of the file, the only one that is written."""
    arguments = [source, "--format", "comfyui", "--output_dir", output_dir, *flags]
    main(parse_args([str(argument) for argument in arguments]))
    (file,) = Path(output_dir).rglob("*")
    return file


def predict(transformer):
    """The velocities of two samples."""
    latents, embeds, timesteps = draw(1, 2, 4, 1, 4, 4), draw(2, 2, 16, 16), torch.tensor([400.0, 800.0])
    with torch.no_grad():
        return transformer(latents, timesteps, encoder_hidden_states=embeds, return_dict=False)[0]


def load_with_lora(model, lora):
    """The expert `transformer_2` of a model with a LoRA that a `WanPipeline` loads from a folder or a file."""
    pipeline = WanPipeline.from_pretrained(model)
    pipeline.load_lora_weights(lora, load_into_transformer_2=True)
    return pipeline.transformer_2


# ---- Names. ---------------------------------------------------------------------------------------------------------


def original_names(num_layers):
    """The names of the tensors of an original Wan text-to-video model."""
    linear = "self_attn.{q,k,v,o} cross_attn.{q,k,v,o} norm3 ffn.{0,2}"
    block = ["modulation", *(f"{kind}_attn.norm_{name}.weight" for kind in ("self", "cross") for name in "qk")]
    for layer in linear.split():
        stem, _, choices = layer.rstrip("}").partition("{")
        block += [f"{stem}{choice}.{part}" for choice in choices.split(",") for part in ("weight", "bias")]
    outer = "patch_embedding text_embedding.0 text_embedding.2 time_embedding.0 time_embedding.2 time_projection.1"
    names = [f"{layer}.{part}" for layer in [*outer.split(), "head.head"] for part in ("weight", "bias")]
    return {*names, "head.modulation", *(f"blocks.{number}.{name}" for number in range(num_layers) for name in block)}


def test_the_14b_expert_has_the_1095_names_of_the_original():
    with torch.device("meta"):
        expert = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(A14B, subfolder="transformer_2"))
    state = expert.state_dict()
    named = {original_name(name): weight for name, weight in state.items()}
    assert len(named) == 27 * 40 + 15 == 1095
    assert named.keys() == original_names(num_layers=40)
    returned = convert_wan_transformer_to_diffusers(dict(named))
    assert {name: id(weight) for name, weight in returned.items()} == {name: id(state[name]) for name in state}


@pytest.mark.parametrize("name", ["blocks.0.attn2.add_k_proj.weight", "blocks.0.norm1.weight", "proj_in.bias", "x"])
def test_a_name_that_the_original_lacks_is_an_error_that_names_it(name):
    with pytest.raises(ValueError) as caught:
        original_name(name)
    assert str(caught.value) == f"`--format comfyui`: the original Wan models have no name for `{name}`."


# ---- All weights. ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_file(plain_run, tmp_path_factory):
    """The export of a finished run."""
    return export(plain_run, tmp_path_factory.mktemp("export"))


def test_a_run_of_all_weights_comes_back_bit_for_bit(whole_file, plain_run):
    assert whole_file.name == "srpo_wan2.2_t2v_low_noise.safetensors"
    weights = load_file(whole_file)
    assert weights.keys() == original_names(num_layers=2)
    assert same_bits(convert_wan_transformer_to_diffusers(weights), load_weights(plain_run))
    with safe_open(whole_file, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_diffusers_predicts_the_same_from_the_single_file(whole_file, plain_run):
    options = {"config": str(plain_run), "subfolder": "transformer_2"}
    expert = WanTransformer3DModel.from_single_file(str(whole_file), **options)
    expected = WanTransformer3DModel.from_pretrained(plain_run, subfolder="transformer_2")
    assert torch.equal(predict(expert), predict(expected))


def test_a_checkpoint_gives_the_file_of_the_finished_run(whole_file, plain_run, tmp_path):
    file = export(plain_run / "checkpoint-2", tmp_path)
    assert file.name == whole_file.name
    assert same_bits(load_file(file), load_file(whole_file))


def test_shards_are_joined(whole_file, plain_run, tmp_path):
    expert = WanTransformer3DModel.from_pretrained(plain_run, subfolder="transformer_2")
    expert.save_pretrained(tmp_path / "run/transformer_2", max_shard_size="50kB")
    assert len(list((tmp_path / "run/transformer_2").glob("*.safetensors"))) > 1
    assert same_bits(load_file(export(tmp_path / "run", tmp_path / "exported")), load_file(whole_file))


@pytest.mark.parametrize("source", ["", "checkpoint-2"])
def test_a_run_in_bfloat16_gives_bfloat16(source, train, tmp_path):
    weights = load_file(export(train(mixed_precision="bf16") / source, tmp_path))
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_the_only_expert_of_a_model_is_not_called_low_noise(
    train, tiny_one_expert_model, one_expert_dataset, tmp_path
):
    inputs = {"model": tiny_one_expert_model, "dataset": one_expert_dataset}
    run = train("--transformer_subfolder", "transformer", **inputs)
    file = export(run, tmp_path / "whole")
    assert file.name == "srpo_wan.safetensors"
    assert same_bits(convert_wan_transformer_to_diffusers(load_file(file)), load_weights(run, "transformer"))


# ---- A LoRA. --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora_file(lora_run, tmp_path_factory):
    """The export of a finished run of rank 4 and alpha 8."""
    return export(lora_run, tmp_path_factory.mktemp("export"))


def test_a_lora_has_the_names_of_comfyui_and_an_alpha_for_each_layer(lora_file):
    assert lora_file.name == "srpo_wan2.2_t2v_lora_low_noise.safetensors"
    weights = load_file(lora_file)
    layers = [f"diffusion_model.blocks.{number}.{kind}_attn.{name}" for number in (0, 1)
              for kind in ("self", "cross") for name in "qkvo"]  # fmt: skip
    parts = "lora_A.weight", "lora_B.weight", "alpha"
    assert weights.keys() == {f"{layer}.{part}" for layer in layers for part in parts}
    for layer in layers:
        assert weights[f"{layer}.lora_A.weight"].shape == (4, 24)
        assert weights[f"{layer}.lora_B.weight"].shape == (24, 4)
        assert weights[f"{layer}.alpha"].shape == ()
        assert weights[f"{layer}.alpha"].item() == 8


def test_the_matrices_of_a_lora_are_those_of_the_run_bit_for_bit(lora_file, lora_run):
    weights, trained = load_file(lora_file), load_lora(lora_run)
    for layer, original in (
        ("blocks.0.attn1.to_q", "blocks.0.self_attn.q"),
        ("blocks.1.attn2.to_out.0", "blocks.1.cross_attn.o"),
    ):
        for part in ("lora_A.weight", "lora_B.weight"):
            assert torch.equal(weights[f"diffusion_model.{original}.{part}"], trained[f"transformer.{layer}.{part}"])
    assert trained["transformer.blocks.0.attn1.to_q.lora_B.weight"].abs().max() > 0.01


def test_diffusers_predicts_the_same_with_either_file_of_a_lora(lora_file, lora_run, tiny_model):
    velocity, expected = (predict(load_with_lora(tiny_model, path)) for path in (lora_file, lora_run))
    base = predict(WanTransformer3DModel.from_pretrained(tiny_model, subfolder="transformer_2"))
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-6)
    assert (velocity - base).abs().max() > 0.01


def test_a_checkpoint_of_a_lora_gives_the_file_of_the_finished_run(lora_file, lora_run, tmp_path):
    assert file_hashes(export(lora_run / "checkpoint-2", tmp_path).parent) == file_hashes(lora_file.parent)
    earlier = load_file(export(lora_run / "checkpoint-1", tmp_path / "earlier"))
    assert earlier.keys() == load_file(lora_file).keys()
    assert not same_bits(earlier, load_file(lora_file))


@pytest.fixture
def download(lora_run, tmp_path):
    """What one finds of a run of a LoRA on the Hub."""
    return Path(shutil.copytree(lora_run, tmp_path / "download", ignore=shutil.ignore_patterns("checkpoint-*")))


def test_without_checkpoints_the_model_card_says_which_expert_it_is(download, lora_file, tmp_path):
    file = export(download, tmp_path / "exported")
    assert file.name == lora_file.name
    card = download / "README.md"
    text = card.read_text().replace(
        "`--transformer_subfolder` | transformer_2 |", "`--transformer_subfolder` | transformer |"
    )
    card.write_text(text)
    assert export(download, tmp_path / "one_expert").name == "srpo_wan_lora.safetensors"


def test_comfyui_adds_to_the_base_what_merging_adds(lora_file, lora_run, tiny_model, tmp_path):
    lora, base = load_file(lora_file), load_weights(tiny_model)
    merging = ["--merge", "--pretrained_model_name_or_path", tiny_model]
    merged = load_file(export(lora_run, tmp_path, *merging))
    for name, weight in ((original_name(name), weight) for name, weight in base.items()):
        layer = f"diffusion_model.{name.removesuffix('.weight')}"
        if f"{layer}.alpha" in lora:
            down, up = lora[f"{layer}.lora_A.weight"], lora[f"{layer}.lora_B.weight"]
            weight = weight + lora[f"{layer}.alpha"].item() / down.shape[0] * (up @ down)
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_merged_expert_is_that_of_the_other_format(mixed_precision, train, tiny_model, tmp_path):
    run = train(*LORA, mixed_precision=mixed_precision)
    merging = ["--merge", "--pretrained_model_name_or_path", tiny_model]
    for number, source in enumerate((run, run / "checkpoint-2")):
        file = export(source, tmp_path / f"{number}", *merging)
        main(parse_args([str(flag) for flag in (source, "--output_dir", tmp_path / f"diffusers-{number}", *merging)]))
        assert file.name == "srpo_wan2.2_t2v_low_noise.safetensors"
        converted = convert_wan_transformer_to_diffusers(load_file(file))
        expected = load_weights(tmp_path / f"diffusers-{number}")
        assert same_bits(converted, expected)
        assert [weight.dtype for weight in converted.values()] == [expected[name].dtype for name in converted]


def test_a_lora_of_every_linear_layer_is_exported(train, tiny_model, tmp_path):
    with torch.device("meta"):
        linear = [name for name, layer in make_transformer().named_modules() if isinstance(layer, torch.nn.Linear)]
    assert len(linear) == 2 * 10 + 6
    run = train(*LORA, "--learning_rate", 0.05, "--lora_target_modules", *linear)
    weights = load_file(export(run, tmp_path / "exported"))
    assert len(weights) == 3 * 26
    alphas = {name: weight.item() for name, weight in weights.items() if name.endswith(".alpha")}
    assert set(alphas.values()) == {8}
    assert {"diffusion_model.blocks.1.ffn.2.alpha", "diffusion_model.head.head.alpha"} <= alphas.keys()
    # ComfyUI has one rule for all layers, but diffusers reads no alpha outside the blocks: there its scale is 1.
    for name in alphas:
        if not name.startswith("diffusion_model.blocks."):
            del weights[name]
            weights[name.replace(".alpha", ".lora_B.weight")] *= 8 / 4
    file = tmp_path / "for_diffusers.safetensors"
    save_file(weights, file)
    velocity, expected = (predict(load_with_lora(tiny_model, path)) for path in (file, run))
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-5)


# ---- What peft can say of a LoRA's scale. ---------------------------------------------------------------------------


@pytest.fixture
def edited(download, lora_run):
    """Function: what to change in the metadata of a finished LoRA, and layers to cut to rank 2 -> its folder."""

    def edit(cut="nothing", **metadata):
        path = download / "pytorch_lora_weights.safetensors"
        with safe_open(path, "pt") as file:
            stored = json.loads(file.metadata()["lora_adapter_metadata"])
        weights = load_file(path)
        for name in weights:
            if cut in name:
                weights[name] = (weights[name][:2] if "lora_A" in name else weights[name][:, :2]).contiguous()
        stored |= {f"transformer.{name}": value for name, value in metadata.items()}
        save_file(weights, path, {"format": "pt", "lora_adapter_metadata": json.dumps(stored)})
        return download

    return edit


@pytest.mark.parametrize(
    ("change", "alphas"),
    [
        ({"lora_alpha": 3}, {"blocks.0.self_attn.q": 3, "blocks.1.cross_attn.k": 3}),
        ({"use_rslora": True}, {"blocks.0.self_attn.q": 16, "blocks.1.cross_attn.k": 16}),  # 8 * sqrt(4)
        ({"alpha_pattern": {"attn2.to_k": 3}}, {"blocks.0.self_attn.q": 8, "blocks.1.cross_attn.k": 3}),
        ({"cut": "attn2.to_k", "rank_pattern": {"attn2.to_k": 2}}, {"blocks.1.cross_attn.k": 8}),
    ],
)
def test_the_scale_is_the_one_that_the_metadata_say(change, alphas, edited, tiny_model, tmp_path):
    run = edited(**change)
    file = export(run, tmp_path / "exported")
    weights = load_file(file)
    assert {layer: weights[f"diffusion_model.{layer}.alpha"].item() for layer in alphas} == alphas
    velocity, expected = (predict(load_with_lora(tiny_model, path)) for path in (file, run))
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-6)


# ---- What is refused. -----------------------------------------------------------------------------------------------


@pytest.fixture
def refusal(tmp_path):
    """Function: what must not be exported -> the message. Fails if it is not one line or a file changes."""

    def refuse(source, *flags):
        before = snapshot(tmp_path)
        with pytest.raises(SystemExit) as caught:
            export(source, tmp_path / "exported", *flags)
        assert snapshot(tmp_path) == before
        assert re.fullmatch("error: .*", caught.value.code), "one line, which makes Python exit with 1"
        return caught.value.code.removeprefix("error: ")

    return refuse


def test_a_lora_whose_expert_is_unknown(refusal, download):
    (download / "README.md").unlink()
    expected = "which expert the LoRA is for is not known: the run's checkpoints and its README.md are missing."
    assert refusal(download) == f"`--format comfyui`: {expected}"


def test_a_lora_whose_ranks_are_not_those_of_its_metadata(refusal, edited):
    message = refusal(edited(cut="blocks.1.attn2.to_k"))
    assert message == "The LoRA of `blocks.1.attn2.to_k` is of rank 2, but its metadata say 4."


def test_a_lora_whose_metadata_peft_does_not_know(refusal, edited):
    run = edited(shape="round")
    assert refusal(run).startswith(f"`{run}` holds a LoRA that cannot be read: ")


def test_a_lora_with_more_than_two_matrices(refusal, download):
    path = download / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    vector = "blocks.0.attn1.to_q.lora_magnitude_vector"
    save_file({**load_file(path), f"transformer.{vector}.weight": torch.ones(24)}, path, metadata)
    message = refusal(download)
    assert message.startswith(f"`--format comfyui`: `{vector}.default.weight` is not of a plain LoRA")


def test_a_lora_of_a_layer_that_the_original_lacks(refusal, download):
    path = download / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = {name.replace("attn2.to_k", "attn2.add_k_proj"): weight for name, weight in load_file(path).items()}
    save_file(weights, path, metadata)
    assert "have no name for `blocks.0.attn2.add_k_proj`." in refusal(download)


def test_an_expert_with_a_tensor_that_the_original_lacks(refusal, tmp_path):
    config = {name: value for name, value in make_transformer().config.items() if not name.startswith("_")}
    expert = WanTransformer3DModel(**{**config, "added_kv_proj_dim": 24})
    expert.save_pretrained(tmp_path / "run/transformer_2")
    message = r"`--format comfyui`: the original Wan models have no name for `blocks\.[01]\.attn2\..*add(ed)?_.*`\."
    assert re.fullmatch(message, refusal(tmp_path / "run"))


def test_a_finished_run_that_lacks_a_tensor(refusal, plain_run, tmp_path):
    run = Path(shutil.copytree(plain_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*")))
    path = run / "transformer_2/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["proj_out.bias"]
    save_file(weights, path)
    expected = "holds no whole model in `transformer_2`: the weights lack 1 tensors, such as `proj_out.bias`"
    assert refusal(run) == f"`{run}` {expected}"


def test_a_finished_run_whose_weights_are_cut_off(refusal, plain_run, tmp_path):
    run = Path(shutil.copytree(plain_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*")))
    path = run / "transformer_2/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert refusal(run).startswith(f"`{run}` holds no whole model in `transformer_2`: ")


def test_a_folder_of_something_else(refusal, tiny_reward):
    assert refusal(tiny_reward).startswith(f"`{tiny_reward}` is not a complete checkpoint of train_srpo_wan_t2i.py")


def test_a_base_model_of_two_experts(refusal, tiny_model):
    assert refusal(tiny_model).startswith(f"`{tiny_model}` is not a complete checkpoint of train_srpo_wan_t2i.py")


def test_merging_whole_weights(refusal, plain_run, tiny_model):
    message = refusal(plain_run, "--merge", "--pretrained_model_name_or_path", tiny_model)
    assert message.startswith(f"`--merge`: `{plain_run}` holds no LoRA, but whole weights, which need no merging")


@pytest.mark.parametrize("kind", ["plain_run", "lora_run"])
def test_a_finished_run_needs_no_export_for_diffusers(kind, refusal, request):
    run = request.getfixturevalue(kind)
    expected = "is a finished run, which diffusers loads as it is. Name one of its checkpoints, or see `--merge` and"
    assert refusal(run, "--format", "diffusers") == f"`{run}` {expected} `--format`."


def test_a_full_disk_leaves_no_file(plain_run, tmp_path, monkeypatch):
    def fail(_file):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(SystemExit, match="error: the disk is full: `.*low_noise.safetensors` takes"):
        export(plain_run, tmp_path / "exported")
    assert not any((tmp_path / "exported").iterdir())


def test_whoever_may_read_the_folder_may_read_the_file(plain_run, tmp_path):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported").chmod(0o755)
    assert export(plain_run, tmp_path / "exported").stat().st_mode & 0o777 == 0o644


def test_the_command_says_what_it_wrote(plain_run, tmp_path, capsys):
    file = export(plain_run, tmp_path)
    assert capsys.readouterr().out.splitlines()[-1] == f"Wrote {file}, the weights of a finished run."


# ---- The workflow. --------------------------------------------------------------------------------------------------

# What the nodes of ComfyUI take through links, in the order of their slots, and what they give.
NODES = {
    "UNETLoader": ({}, ["MODEL"]),
    "LoraLoaderModelOnly": ({"model": "MODEL"}, ["MODEL"]),
    "ModelSamplingSD3": ({"model": "MODEL"}, ["MODEL"]),
    "CLIPLoader": ({}, ["CLIP"]),
    "CLIPTextEncode": ({"clip": "CLIP"}, ["CONDITIONING"]),
    "EmptyHunyuanLatentVideo": ({}, ["LATENT"]),
    "KSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        ["LATENT"],
    ),
    "VAELoader": ({}, ["VAE"]),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"]),
    "SaveImage": ({"images": "IMAGE"}, []),
}


@pytest.fixture(scope="module")
def workflow():
    return json.loads((ROOT / "docs/comfyui_t2i.json").read_text())


def values(workflow, kind):
    """The values of the widgets of the only node of a kind."""
    (node,) = (node for node in workflow["nodes"] if node["type"] == kind)
    return node["widgets_values"]


def test_the_nodes_of_the_workflow_have_the_slots_of_comfyui(workflow):
    nodes = workflow["nodes"]
    assert {node["type"] for node in nodes} == NODES.keys()
    assert [node["id"] for node in nodes] == list(range(1, workflow["last_node_id"] + 1))
    for node in nodes:
        inputs, outputs = NODES[node["type"]]
        assert {slot["name"]: slot["type"] for slot in node["inputs"]} == inputs
        assert [slot["name"] for slot in node["inputs"]] == list(inputs)
        assert [slot["type"] for slot in node["outputs"]] == outputs


def test_each_link_of_the_workflow_joins_two_slots_of_its_type(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    inputs, outputs = [], []
    for number, source, output, target, entry, kind in workflow["links"]:
        assert nodes[source]["outputs"][output]["type"] == nodes[target]["inputs"][entry]["type"] == kind
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][entry]["link"] == number
        inputs.append((target, entry))
        outputs.append(number)
    assert outputs == list(range(1, workflow["last_link_id"] + 1))
    assert sorted(inputs) == [(number, slot) for number in nodes for slot in range(len(nodes[number]["inputs"]))]
    linked = [number for node in nodes.values() for slot in node["outputs"] for number in slot["links"]]
    assert sorted(linked) == outputs


def test_the_workflow_paints_with_the_expert_the_lora_and_the_shift_in_a_row(workflow):
    kinds = {node["id"]: node["type"] for node in workflow["nodes"]}
    model = [(kinds[source], kinds[target]) for _, source, _, target, _, kind in workflow["links"] if kind == "MODEL"]
    row = ["UNETLoader", "LoraLoaderModelOnly", "ModelSamplingSD3", "KSampler"]
    assert model == list(zip(row, row[1:], strict=False))


def test_the_workflow_names_the_files_that_are_exported(workflow, whole_file, lora_file):
    assert values(workflow, "UNETLoader") == [whole_file.name, "default"]
    assert values(workflow, "LoraLoaderModelOnly") == [lora_file.name, 1.0]
    assert values(workflow, "CLIPLoader")[1:] == ["wan", "default"]
    assert values(workflow, "VAELoader") == ["wan_2.1_vae.safetensors"]
    bypassed = [node["type"] for node in workflow["nodes"] if node["mode"] == 4]
    assert bypassed == ["LoraLoaderModelOnly"], "the file of the expert needs no LoRA"


def test_the_workflow_paints_what_a_run_paints_by_default(workflow, make_args):
    args, flow_shift = make_args(), UniPCMultistepScheduler.load_config(A14B, subfolder="scheduler")["flow_shift"]
    settings = [args.num_inference_steps, args.validation_guidance_scale, "uni_pc", "simple", 1.0]
    assert values(workflow, "KSampler")[2:] == settings == [40, 3.0, "uni_pc", "simple", 1.0]
    assert values(workflow, "ModelSamplingSD3") == [flow_shift] == [3.0]
    assert values(workflow, "EmptyHunyuanLatentVideo") == [args.validation_size, args.validation_size, 1, 1]
    assert args.validation_size == 1024
    texts = [node["widgets_values"] for node in workflow["nodes"] if node["type"] == "CLIPTextEncode"]
    assert texts[1] == [WAN_NEGATIVE_PROMPT]
    negative = [link[1] for link in workflow["links"] if link[3:5] == [9, 2]]
    assert negative == [8]
