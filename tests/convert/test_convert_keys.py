"""Keys of real configs, of many ages: understood, harmless, or refused by name; and checkpoints in odd forms."""

import json
from pathlib import Path
import shutil

from flax import nnx
import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.convert.test_convert import TOKENIZER, convert  # noqa: F401 (a fixture)
from tests.helpers import reference
from voco_jax.checkpoint.init_from import begin_with_run
from voco_jax.config import default_config, load_config
from voco_jax.convert import families
from voco_jax.convert.gguf_files import gguf_tokenizer, read_gguf
from voco_jax.convert.sources import open_source
from voco_jax.convert.to_jax import has_voco_row
from voco_jax.convert.torch_files import read_torch
from voco_jax.convert.vocabulary import EMBEDDING, with_fresh_rows
from voco_jax.errors import UserError
from voco_jax.models.llama import RopeScaling, rope_frequencies
from voco_jax.models.projector import Projector

FILE = Path("config.json")
LLAVA_15 = {  # as released, of transformers 4.31
    "_name_or_path": "llava-v1.5-7b", "architectures": ["LlavaLlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False, "hidden_act": "silu", "hidden_size": 4096,
    "image_aspect_ratio": "pad", "image_grid_pinpoints": None, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_length": 4096, "max_position_embeddings": 4096, "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None, "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "model_type": "llava", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False, "unfreeze_mm_vision_tower": False,
    "use_cache": True, "use_mm_proj": True, "vocab_size": 32000,
}  # fmt: skip
FINE_TUNE = LLAVA_15 | {  # later code and other tools add
    "attention_bias": False, "attention_dropout": 0.0, "rope_theta": 10000.0, "mm_patch_merge_type": "flat",
    "mm_projector_lr": 2e-5, "mm_vision_tower_lr": None, "tokenizer_model_max_length": 2048, "s2": False,
    "tokenizer_padding_side": "right", "image_crop_resolution": 224, "image_split_resolution": 224, "s2_scales": "336",
    "use_pos_skipping": False, "pos_skipping_range": 4096, "mm_tunable_parts": "mm_mlp_adapter", "mlp_bias": False,
    "mm_spatial_pool_mode": None, "eos_token_id": [2, 3], "_attn_implementation_autoset": True,
    "unsloth_version": "2024.9", "lora_r": 128, "vision_tower_lr": 2e-6, "mm_use_im_patch_token": True,
}  # fmt: skip
SMOLLM = {
    "is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"},
    "model_type": "llama", "hidden_act": "silu", "num_key_value_heads": 3, "rope_theta": 100000,
}  # fmt: skip
OLD = {  # of a part of a model, as transformers before 4.38 wrote it
    "_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None, "pruned_heads": {},
    "begin_suppress_tokens": None, "bos_token_id": None, "chunk_size_feed_forward": 0, "diversity_penalty": 0.0,
    "cross_attention_hidden_size": None, "decoder_start_token_id": None, "do_sample": False, "dropout": 0.0,
    "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "eos_token_id": None, "finetuning_task": None,
    "exponential_decay_length_penalty": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0"}, "is_decoder": False, "is_encoder_decoder": False, "label2id": {"LABEL_0": 0},
    "length_penalty": 1.0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1,
    "num_beams": 1, "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False,
    "output_scores": False, "prefix": None, "problem_type": None, "remove_invalid_values": False,
    "repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None,
    "suppress_tokens": None, "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False,
    "tie_encoder_decoder": False, "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torchscript": False,
    "transformers_version": "4.16.0", "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip
CLIP_TOWER = {
    "attention_dropout": 0.0, "hidden_act": "quick_gelu", "hidden_size": 1024, "image_size": 336,
    "initializer_factor": 1.0, "intermediate_size": 4096, "layer_norm_eps": 1e-5, "model_type": "clip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    "tie_word_embeddings": True, "vocab_size": 32000,
}  # fmt: skip


def test_real_configs_are_understood():
    for keys, fields in (
        (families.llava.KEYS, LLAVA_15),
        (families.llava.KEYS, FINE_TUNE),
        (families.llama.KEYS, SMOLLM),
        (families.llama.KEYS, OLD | {"model_type": "llama"}),
        (families.clip.KEYS, OLD | CLIP_TOWER),
        (families.llama.KEYS, transformers.LlamaConfig().to_dict()),
        (families.clip.KEYS, transformers.CLIPVisionConfig().to_dict()),
        (families.siglip.KEYS, transformers.SiglipVisionConfig().to_dict()),
        (families.siglip.WHOLE_KEYS, transformers.SiglipConfig().to_dict()),
        (families.llava.HF_KEYS, transformers.LlavaConfig().to_dict() | {"ignore_index": -100, "vocab_size": 32064}),
    ):
        assert keys.problems(fields) == []


@pytest.mark.parametrize(
    ("keys", "key", "value"),
    [
        (families.llava.KEYS, "mm_resampler_type", "perceiver"),
        (families.llava.KEYS, "mm_spatial_pool_stride", 2),
        (families.llava.KEYS, "mm_spatial_pool_mode", "average"),
        (families.llava.KEYS, "s2", True),
        (families.llava.KEYS, "mm_vision_tower_interpolate", True),
        (families.llava.KEYS, "mm_patch_merge_type", "spatial_unpad"),
        (families.llava.KEYS, "mm_use_im_start_end", True),
        (families.llava.KEYS, "mm_of_tomorrow", False),
        (families.llama.KEYS, "attention_multiplier", 1.0),
        (families.llama.KEYS, "embedding_multiplier", 12.0),
        (families.llama.KEYS, "residual_multiplier", 0.22),
        (families.llama.KEYS, "logits_scaling", 8.0),
        (families.llama.KEYS, "final_logit_softcapping", 30.0),
        (families.llama.KEYS, "attention_bias", True),
        (families.llama.KEYS, "mlp_bias", True),
        (families.llama.KEYS, "sliding_window", 4096),
        (families.llama.KEYS, "layer_types", ["sliding_attention"]),
        (families.llama.KEYS, "num_local_experts", 8),
        (families.llama.KEYS, "pruned_heads", {"0": [1]}),
        (families.llama.KEYS, "quantization_config", {"quant_method": "gptq", "bits": 4}),
        (families.clip.KEYS, "hidden_act", "relu"),
        (families.siglip.KEYS, "hidden_act", "silu"),
        (families.siglip.KEYS, "num_patches", 256),
        (families.clip.KEYS, "num_channels", 4),
        (families.llava.HF_KEYS, "projector_hidden_act", "relu"),
        (families.llava.HF_KEYS, "multimodal_projector_bias", "none"),
        (families.llava.HF_KEYS, "image_grid_pinpoints", [[336, 672]]),
    ],
)
def test_keys_that_change_the_function_are_refused(keys, key, value):
    with pytest.raises(UserError, match=rf"^config.json: text_config.{key}: .*found ") as error:
        keys.check({key: value}, FILE, "text_config.")
    assert "\n" not in str(error.value)
    assert keys.problems({key: None}) == []


def test_a_key_that_the_user_vouches_for():
    """An unknown one; of the known ones we know better."""
    assert families.llama.KEYS.problems({"my_key": 3, "mlp_bias": True}, ignored=["my_key", "mlp_bias"]) == [
        "mlp_bias: expected False or None, found True"
    ]


def test_the_first_clips_say_it_twice():
    """openai/clip-vit-large-patch14: what `vision_config_dict` says holds, as in transformers."""
    fields = {"model_type": "clip", "vision_config": OLD | CLIP_TOWER, "vision_config_dict": {"image_size": 224}}
    fields |= {"text_config": {}, "text_config_dict": None, "logit_scale_init_value": 2.6592}
    assert families.clip.from_hf(fields, FILE).image_size == 224
    wrong = fields | {"vision_config": CLIP_TOWER | {"hidden_act": "relu"}}
    with pytest.raises(UserError, match=r"^config.json: vision_config.hidden_act: expected 'quick_gelu' or .*'relu'"):
        families.clip.from_hf(wrong, FILE)


# ---- Checkpoints in the forms they come in ---------------------------------------------------------------------------


@pytest.fixture
def llava(tmp_path) -> Path:
    """The golden checkpoint, to be changed."""
    return reference.copy_checkpoint(tmp_path / "source")


def rename(source: Path, change) -> dict[str, np.ndarray]:
    tensors = {change(name): x for name, x in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors")
    return tensors


def test_prefixes_of_wrapped_models(llava):
    """DataParallel's and torch.compile's go; PEFT's, with adapters inside, does not."""
    rename(llava, lambda name: f"_orig_mod.module.{name}")
    source = open_source(llava)
    assert source.missing_parts() == [] and source.problems == []
    rename(llava, lambda name: f"base_model.model.{name.removeprefix('_orig_mod.module.')}")
    with pytest.raises(UserError, match=r"base_model.model.\S+: PEFT's name of a tensor; .* merge_and_unload"):
        open_source(llava)


def test_several_files_that_could_be_it(llava):
    """Safetensors before .bin, with a note; an index of shards that are gone is no other; else one must be chosen."""
    shutil.copy(llava / "model.safetensors", llava / "pytorch_model.bin")
    source = open_source(llava)
    assert source.notes == [f"{llava}: model.safetensors is read, pytorch_model.bin beside it is not"]
    index = llava / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}))
    assert open_source(llava).missing_parts() == []
    shutil.copy(llava / "model.safetensors", llava / "model-00001-of-00001.safetensors")
    both = "expected one checkpoint, found model.safetensors and model.safetensors.index.json"
    with pytest.raises(UserError, match=both):
        open_source(llava)


def test_an_ignored_key(llava, convert):  # noqa: F811
    fields = json.loads((llava / "config.json").read_text())
    (llava / "config.json").write_text(json.dumps(fields | {"my_key": 3}))
    status, _, err = convert("inspect", llava)
    assert status == 2 and "my_key: unknown, and may change what the model computes; found 3 (harmless? --ignore" in err
    assert convert("inspect", llava, "--ignore-key", "my_key")[0] == 0


def test_layer_in_a_list(llava):
    fields = json.loads((llava / "config.json").read_text())
    for given, selected in ([-2], -2), ([-1], -1), (-3, -3):
        (llava / "config.json").write_text(json.dumps(fields | {"mm_vision_select_layer": given}))
        assert open_source(llava).vision.select_layer == selected
    (llava / "config.json").write_text(json.dumps(fields | {"mm_vision_select_layer": [-2, -5]}))
    with pytest.raises(UserError, match=r"mm_vision_select_layer: expected one layer, found \[-2, -5\]"):
        open_source(llava)


@pytest.mark.peer
def test_tensors_that_are_not_contiguous(tmp_path):
    """Transposed, sliced with a stride, and views into one storage; a repeated value is refused."""
    import torch

    whole = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    tensors = {
        "plain": whole, "transposed": whole.T, "every second": whole[::2, 1::3],
        "permuted": whole.view(5, 4, 3).permute(2, 0, 1), "one": whole[3:4, 2:3].T, "none": whole[:, :0],
    }  # fmt: skip
    torch.save(tensors, tmp_path / "x.bin")
    read = read_torch(tmp_path / "x.bin")
    assert not tensors["transposed"].is_contiguous()
    for name, tensor in tensors.items():
        values = read[name].read()
        assert values.flags.c_contiguous and values.shape == read[name].shape
        np.testing.assert_array_equal(values, tensor.numpy())
    torch.save({"repeated": torch.zeros(1).expand(10**6)}, tmp_path / "y.bin")
    with pytest.raises(UserError, match="reaches beyond its storage"):
        read_torch(tmp_path / "y.bin")


def test_projector_of_one_layer(llava, convert):  # noqa: F811
    """LLaVA's first: `linear`, or no key at all, with a tensor of its own name; and what the layer computes."""
    fields = json.loads((llava / "config.json").read_text())
    rename(llava, lambda name: name.replace("mm_projector.0.", "mm_projector."))
    tensors = load_file(llava / "model.safetensors")
    save_file({n: x for n, x in tensors.items() if "mm_projector.2" not in n}, llava / "model.safetensors")
    for change in {"mm_projector_type": "linear"}, {"mm_projector_type": None}, {}:
        kept = {key: value for key, value in fields.items() if key != "mm_projector_type"}
        (llava / "config.json").write_text(json.dumps(kept | change))
        source = open_source(llava)
        assert source.projector_layers == 1 and source.problems == []
        weight = source.tensors["projector.linear_1.kernel", None].read()
        np.testing.assert_array_equal(weight, tensors["model.mm_projector.weight"])
    status, _, err = convert("to-jax", llava, llava.parent / "run", *TOKENIZER)
    assert status == 0, err
    assert load_config(llava.parent / "run" / "config.json").model.projector_layers == 1
    config = default_config()
    config.init_from = str(llava.parent / "run")
    assert begin_with_run(config).model.projector_layers == 1
    assert convert("to-hf", llava.parent / "run", llava.parent / "back", "--format", "voco")[0] == 0
    status, out, _ = convert("verify", llava, llava.parent / "back")
    assert status == 0 and "94 of 94 tensors are identical" in out
    status, _, err = convert("to-hf", llava.parent / "run", llava.parent / "hf", "--format", "llava-hf")
    assert status == 2 and "projector_layers 1: format llava-hf cannot store it" in err

    projector = Projector(3, 5, 1, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    expected = x @ np.asarray(projector.linear_1.kernel[...]) + np.asarray(projector.linear_1.bias[...])
    np.testing.assert_allclose(jax.jit(projector)(x), expected, atol=1e-6)
    assert not hasattr(projector, "linear_2")


# ---- Rows of <voco> --------------------------------------------------------------------------------------------------


def test_mean_of_the_real_rows():
    """Of the tokens' rows alone: neither padding, nor zeros that nobody trained, nor the old row of the new token."""
    values = np.arange(1, 15, dtype=np.float32).reshape(7, 2)
    values[1] = 0
    new = with_fresh_rows(values, 7, {4}, tokens={0, 1, 2, 3})
    np.testing.assert_array_equal(new[4], values[[0, 2, 3]].mean(0))
    np.testing.assert_array_equal(np.delete(new, 4, axis=0), np.delete(values, 4, axis=0))


@pytest.mark.parametrize(("rows", "trained"), [(32001, True), (32064, False), (32000, False)])
def test_a_row_without_a_token_is_trained_only_in_voco_llama(rows, trained, llava):
    """The last row of a vocabulary that has one more than its tokenizer; elsewhere, and of zeros, it is padding."""
    tensors = load_file(llava / "model.safetensors")
    for name in "model.embed_tokens.weight", "lm_head.weight":
        tensors[name] = np.resize(tensors[name], (rows, 32))
    save_file(tensors, llava / "model.safetensors")
    assert has_voco_row(open_source(llava), 32000) == trained
    tensors["model.embed_tokens.weight"][-1] = 0
    save_file(tensors, llava / "model.safetensors")
    source = open_source(llava)
    assert source.tensors[EMBEDDING, None].shape[0] == rows and not has_voco_row(source, 32000)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def write_gguf(file: Path, extra: dict, rope_freqs: np.ndarray | None = None) -> None:
    writer = gguf.GGUFWriter(str(file), extra.pop("general.architecture", "llama"))
    numbers = {"context_length": 1024, "embedding_length": 32, "block_count": 1, "feed_forward_length": 48}
    for key, value in numbers.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(4), writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_freq_base(10000.0)
    for key, value in extra.items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds[type(value)](key, value)
    writer.add_tensor("token_embd.weight", np.zeros((50, 32), np.float32))
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()


YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, None),
        ({"mradermacher.quantized_by": "someone", "general.type": "model", "split.count": 0}, None),
        ({"llama.rope.scale_linear": 4.0}, RopeScaling(rope_type="linear", factor=4.0)),
        ({"llama.rope.scaling.factor": 2.0}, RopeScaling(rope_type="linear", factor=2.0)),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 8.0}, RopeScaling(rope_type="linear")),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 8.0}, None),
        (YARN, RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024)),
        (
            YARN | {"llama.rope.scaling.original_context_length": 256, "llama.rope.scaling.yarn_beta_fast": 16.0},
            RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=256, beta_fast=16.0),
        ),
    ],
)
def test_gguf_rope(extra, expected, tmp_path):
    write_gguf(tmp_path / "x.gguf", dict(extra))
    config, _ = read_gguf(tmp_path / "x.gguf")
    assert config.rope_scaling == expected and (config.head_dim, config.rope_theta) == (8, 10000.0)


@pytest.mark.peer
def test_gguf_factors_of_llama_3(tmp_path):
    """`rope_freqs.weight`: by what Llama 3's scaling divides each frequency, as llama.cpp's converter writes it."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 10000.0}
    shape = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=131072)
    theirs, plain = (
        LlamaRotaryEmbedding(transformers.LlamaConfig(**shape, rope_parameters=rope)).inv_freq.numpy()
        for rope in (scaling, {"rope_type": "default", "rope_theta": 10000.0})
    )
    extra = {"llama.attention.key_length": 64, "llama.attention.value_length": 64}
    write_gguf(tmp_path / "x.gguf", dict(extra), plain / theirs)
    config, tensors = read_gguf(tmp_path / "x.gguf")
    assert config.rope_scaling == RopeScaling(factor=32.0) and "rope_freqs.weight" not in tensors
    np.testing.assert_allclose(rope_frequencies(config), theirs, rtol=1e-5)
    write_gguf(tmp_path / "y.gguf", dict(extra), np.ones(32))
    assert read_gguf(tmp_path / "y.gguf")[0].rope_scaling is None
    write_gguf(tmp_path / "z.gguf", dict(extra), np.linspace(1, 9, 32))
    with pytest.raises(UserError, match=r"rope_freqs.weight: expected the factors of Llama 3's scaling, found others"):
        read_gguf(tmp_path / "z.gguf")


@pytest.mark.peer
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_gguf_of_qwen(architecture, tmp_path):
    """A file under llama.cpp's names: transformers reads it as the model that it was made of, and so do we."""
    head_dim = {"qwen2": 8, "qwen3": 128}[architecture]  # transformers reads no other of a GGUF file
    fields = dict(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=64,
        tie_word_embeddings=architecture == "qwen2",
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=2**-20,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(architecture, **fields))
    state = {name: tensor.normal_().numpy() for name, tensor in model.state_dict().items()}
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), architecture)
    writer.add_context_length(64), writer.add_embedding_length(32), writer.add_feed_forward_length(48)
    writer.add_block_count(2), writer.add_head_count(4), writer.add_head_count_kv(2), writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(2**-20), writer.add_rope_freq_base(1e6), writer.add_vocab_size(50)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 2)
    for name, values in state.items():
        if name != "lm_head.weight" or architecture == "qwen3":
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), values)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()

    config, tensors = read_gguf(tmp_path / "x.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf").state_dict()
    assert theirs.keys() == state.keys() and tensors.keys() == state.keys() - (
        {"lm_head.weight"} if config.tie_word_embeddings else set()
    )
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.read(), state[name])
        np.testing.assert_array_equal(theirs[name].numpy(), state[name])
    expected = families.LANGUAGE_MODELS[architecture].from_hf(model.config.to_dict(), FILE)
    assert config == expected and (config.qkv_bias, config.qk_norm) == (
        architecture == "qwen2",
        architecture == "qwen3",
    )


@pytest.mark.peer
def test_gguf_tokenizer_of_qwen(tmp_path):
    """Text is split as Qwen's own tokenizer does; it has no BOS, whatever the file names, and two stop tokens."""
    tokens = [*bytes_to_unicode().values(), "Ġt", "he", "Ġthe", "ll", "'ll", "<|endoftext|>", "<|im_end|>"]
    merges = ["Ġ t", "h e", "Ġt he", "l l", "' ll"]
    kinds = [int(gguf.TokenType.NORMAL)] * (len(tokens) - 2) + [int(gguf.TokenType.CONTROL)] * 2
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "qwen2")
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("qwen2"), writer.add_eos_token_id(len(tokens) - 1)
    (
        writer.add_bos_token_id(len(tokens) - 2),
        writer.add_eot_token_id(len(tokens) - 2),
        writer.add_chat_template("{{ 1 }}"),
    )
    writer.add_token_list(tokens), writer.add_token_merges(merges), writer.add_token_types(kinds)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    ours = gguf_tokenizer(tmp_path / "x.gguf")
    assert (ours.bos_token, ours.chat_template) == (None, "{{ 1 }}")
    assert ours.origin.stop_ids == (len(tokens) - 2,)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    theirs = transformers.Qwen2TokenizerFast(vocab=vocabulary, merges=[tuple(m.split(" ")) for m in merges])
    theirs.add_special_tokens({"additional_special_tokens": ["<|endoftext|>", "<|im_end|>"]})
    for text in (
        "The 1234 they'll see.\n\n  Äpfel\u0308 (the) <|im_end|> 二二\t\r\n end ",
        "the'LL 'll don't  the",
        "é e\u0301",
    ):
        assert ours(text).input_ids == theirs(text).input_ids, text


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"general.architecture": "gemma"},
            "general.architecture: expected 'llama' or 'qwen2' or 'qwen3', found 'gemma'",
        ),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type: expected none, linear or yarn; found 'longrope'"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count: expected 8, the size of a head; found 4"),
        ({"llama.attention.value_length": 4}, "attention.value_length: expected 8, the size of a head; found 4"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale: expected 0.353553, found 0.5"),
        ({"llama.attention.scale": "x"}, "llama.attention.scale: expected a number, found 'x'"),
        ({"llama.expert_count": 8}, "llama.expert_count: expected 0, found 8"),
        ({"llama.attention.sliding_window": 512}, "llama.attention.sliding_window: expected 0, found 512"),
        ({"llama.of_tomorrow": 1}, "llama.of_tomorrow: unknown, and may change what the model computes; found 1"),
        ({"split.count": 2}, "split.count: expected 0 or 1, found 2"),
        ({"general.type": "adapter"}, "general.type: expected 'model', found 'adapter'"),
    ],
)
def test_gguf_keys_that_are_refused(extra, message, tmp_path):
    write_gguf(tmp_path / "x.gguf", dict(extra))
    with pytest.raises(UserError, match=rf"x.gguf: .*{message}"):
        read_gguf(tmp_path / "x.gguf")


def test_a_gguf_tokenizer_that_is_not_whole(tmp_path):
    write_gguf(tmp_path / "x.gguf", {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"})
    with pytest.raises(UserError, match="x.gguf: key 'tokenizer.ggml.tokens' is missing; use --tokenizer DIR"):
        gguf_tokenizer(tmp_path / "x.gguf")
