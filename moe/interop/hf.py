"""Weights in and out as a Hugging Face DeepSeek-V3 folder, which transformers and vLLM load too.

    config.json                                   hf_config.py
    model.safetensors, or model-0000i-of-0000n.safetensors and model.safetensors.index.json        names: hf_names.py
    tokenizer.json, tokenizer_config.json, generation_config.json      hf_folder.py, with to_hf(tokenizer=...)

MTP modules are written as layers behind the last one, as DeepSeek released them; vLLM drafts with them. transformers
knows them only by the name `model.layers.61` and lists others as unexpected. Before its generate(use_mtp=True) tell it,
N being num_hidden_layers: model._keys_to_ignore_on_load_unexpected = [r"model\\.layers\\.N\\..*"].

Block-fp8 weights are dequantised on reading, never written.

One difference is left to others: with rms_norm_eps other than 1e-6, transformers and DeepSeek's own code still take
1e-6 in the two norms of the latents; vLLM, SGLang and we take rms_norm_eps. `to_hf` warns.

Source: deepseek-ai/DeepSeek-V3 README_WEIGHTS.md; transformers 5.23. Nothing is unpickled: pickled weights are refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.config import ModelConfig, UserError
from moe.interop import hf_config
from moe.interop.hf_folder import replacing, write_json, write_tokenizer
from moe.interop.hf_names import BLOCK, Piece, copies, dequantise, empties, layout, misfits, mtp_depth
from moe.model import Transformer

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}  # bf16 for others: fp8 is not kept
Warn = Callable[[str], Any]


def from_hf(
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    mtp: bool = True,
    device: torch.device | str = "cpu",
    warn: Warn = warnings.warn,
) -> Transformer:
    """The model in a DeepSeek-V3 folder, or in `export/` of a run folder. In training mode, as any new module.

    dtype: None keeps the stored one (that of the embedding). mtp=False never reads the MTP modules.
    """
    folder = _folder(Path(path))
    source = hf_config.read(folder / "config.json", warn)
    config = source.config if mtp else dataclasses.replace(source.config, num_nextn_predict_layers=0)
    with ExitStack() as stack:
        tensors = _open(folder, stack, lambda name: mtp or mtp_depth(config, name) is None)
        config = _present_mtp(config, tensors, folder, warn)
        with torch.device("meta"):
            model = Transformer(config)
        stored = {name: _header(handle.get_slice(name)) for name, (handle, _) in tensors.items()}
        _check(folder, misfits(config, model.state_dict(), stored, source.fp8_block))
        dtype = dtype or DTYPES.get(stored["model.embed_tokens.weight"][1], torch.bfloat16)
        model = model.to(dtype).to_empty(device=device)
        if config.tie_word_embeddings:
            model.head.weight = model.embed.weight  # to_empty makes one tensor for each name
        _fill(model, config, tensors, source.fp8_block, folder, warn)
    return model


def to_hf(
    model: nn.Module,
    path: str | os.PathLike,
    tokenizer: Any = None,
    mtp: bool = True,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 4_000_000_000,
    warn: Warn = warnings.warn,
) -> Path:
    """Write `model` as a DeepSeek-V3 folder, whole or not at all; an earlier export there is replaced at the end.

    tokenizer: a moe.data.tokenizer.Tokenizer or the path of a tokenizer.json. mtp=False leaves the MTP modules out.
    dtype: of the weights, router biases excepted. At most one shard is held besides the model. Call it from one rank.
    """
    from safetensors import SafetensorError

    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    config = model.config if mtp else dataclasses.replace(model.config, num_nextn_predict_layers=0)
    hf_config.check_writable(config)
    if config.rms_norm_eps != 1e-6:
        warn(
            f"model.rms_norm_eps={config.rms_norm_eps} is not 1e-6: transformers takes 1e-6 in the latents' norms "
            "all the same, so its logits will differ a little; vLLM and SGLang follow rms_norm_eps"
        )
    pieces, state = _to_write(model, config, mtp)
    dtype = dtype or state["embed.weight"].dtype
    try:
        with replacing(path) as folder:
            ids = {}
            if tokenizer is not None:
                ids = write_tokenizer(folder, tokenizer, config.vocab_size, config.max_position_embeddings)
            write_json(folder / "config.json", hf_config.to_json(config, str(dtype).removeprefix("torch."), ids))
            _write_weights(folder, pieces, empties(config), state, dtype, max_shard_bytes)
    except (OSError, SafetensorError) as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
        raise UserError(
            f"export to {path} cannot be written: {reason}; what was there stays as it was; free some space or name "
            "another folder"
        ) from None
    return Path(path)


# ------------------------------------------------------------------------------------------------------------- writing


def _to_write(model: nn.Module, config: ModelConfig, mtp: bool) -> tuple[list[Piece], dict[str, Tensor]]:
    """What goes into the folder, after a look that every tensor of the model has a place there."""
    state = model.state_dict()
    pieces = list(layout(config))
    placed = {p.key for p in pieces} | ({"head.weight"} if config.tie_word_embeddings else set())
    homeless = sorted(k for k in state if k not in placed and (mtp or not k.startswith("mtp.")))
    absent = sorted(placed - set(state))
    if homeless or absent:
        what = f"has no name for {_some(homeless)}" if homeless else f"wants {_some(absent)}, which this model lacks"
        raise UserError(
            f"model.name={config.name} cannot be exported: the DeepSeek-V3 format {what}; "
            "keep the run's own checkpoint instead (train.export=false)"
        )
    return [*pieces, *copies(config)], state


def _write_weights(
    folder: Path,
    pieces: list[Piece],
    hollow: dict[str, tuple[int, int]],
    state: dict[str, Tensor],
    dtype: torch.dtype,
    limit: int,
) -> None:
    from safetensors.torch import save_file

    def stored(piece: Piece) -> torch.dtype:
        return torch.float32 if piece.key.endswith("router.bias") else dtype

    shards: list[list[Piece]] = [[]]
    used = total = 0
    for piece in pieces:
        size = state[piece.key][piece.where].numel() * stored(piece).itemsize
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(piece)
        used, total = used + size, total + size

    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = ONE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {p.name: _plain(state[p.key][p.where], stored(p)) for p in shard}
        if number == 1:
            tensors |= {name: torch.zeros(shape, dtype=dtype) for name, shape in hollow.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        del tensors
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """On the CPU and with its own memory: copies of the embedding would overlap, which safetensors refuses."""
    return tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()


# ------------------------------------------------------------------------------------------------------------- reading


def _folder(path: Path) -> Path:
    if not path.exists():
        raise UserError(
            f"{path} does not exist; name a local folder (a model of the hub has to be downloaded first: "
            f"hf download {path} --local-dir FOLDER)"
        )
    if not (path / "config.json").exists() and (path / "export" / "config.json").exists():
        return path / "export"
    return path


def _open(folder: Path, stack: ExitStack, wanted: Callable[[str], bool]) -> dict[str, tuple[Any, Path]]:
    """Name -> (open file, its path) of every wanted tensor; no tensor is read, and no file without a wanted one."""
    from safetensors import SafetensorError, safe_open

    promised = {tensor: file for tensor, file in _index(folder).items() if wanted(tensor)}
    names = sorted(set(promised.values())) if promised else sorted(p.name for p in folder.glob("model*.safetensors"))
    if not promised and ONE in names:
        names = [ONE]  # as transformers chooses
    if not names:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise UserError(
                f"{folder} holds only pickled weights ({_some(pickles)}), which are never opened: they can run code; "
                "convert them where you trust them: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
            )
        raise UserError(f"{folder} has no {ONE} or {INDEX}; download or export the folder again")
    found: dict[str, tuple[Any, Path]] = {}
    for name in names:
        file = folder / name
        try:
            handle = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
        except FileNotFoundError:
            raise UserError(f"{file} is missing, but {INDEX} names it; download or export the folder again") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is cut short or damaged ({error}); download or export it again") from None
        for tensor in filter(wanted, handle.keys()):
            if tensor in found:
                raise UserError(f"{file} repeats {tensor} of {found[tensor][1].name}; delete the left-over file")
            found[tensor] = handle, file
    lost = sorted(t for t, name in promised.items() if t not in found or found[t][1].name != name)
    if lost:
        raise UserError(f"{folder / INDEX} promises {_some(lost)}, not found there; download the folder again")
    return found


def _index(folder: Path) -> dict[str, str]:
    file = folder / INDEX
    if not file.exists() or (folder / ONE).exists():
        return {}
    try:
        names = json.loads(file.read_bytes())["weight_map"]
        names = {str(k): str(v) for k, v in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file} is damaged: no weight_map can be read; download or export it again") from None
    for name in names.values():
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise UserError(f"{file} names {name!r}, which is not a safetensors file of this folder; export it again")
    return names


def _present_mtp(config: ModelConfig, tensors: dict, folder: Path, warn: Warn) -> ModelConfig:
    """transformers drops MTP tensors when it saves, but keeps their number in config.json."""
    depths = {mtp_depth(config, name) for name in tensors} - {None}
    there = min(max(depths, default=-1) + 1, config.num_nextn_predict_layers)
    if there == config.num_nextn_predict_layers:
        return config
    warn(
        f"{folder} has weights for {there} of num_nextn_predict_layers={config.num_nextn_predict_layers} MTP modules; "
        f"the model is loaded with {there} (mtp=False loads without them silently)"
    )
    return dataclasses.replace(config, num_nextn_predict_layers=there)


def _check(folder: Path, found: list[str]) -> None:
    if found:
        raise UserError(
            f"{folder} does not fit its config.json, {len(found)} tensor{'s' * (len(found) > 1)}: "
            f"{'; '.join(found[:3])}{'; ...' if found[3:] else ''}; correct config.json, or download or export the "
            "folder again"
        )


def _fill(
    model: Transformer,
    config: ModelConfig,
    tensors: dict[str, tuple[Any, Path]],
    block: tuple[int, int] | None,
    folder: Path,
    warn: Warn,
) -> None:
    state = model.state_dict()
    for piece, tensor in _read(layout(config), tensors, block):
        state[piece.key][piece.where].copy_(tensor)
    for piece, tensor in _read((p for p in copies(config) if p.name in tensors), tensors, block):
        ours = state[piece.key]
        if not torch.equal(ours, tensor.to(ours)):
            warn(f"{folder}: {piece.name} differs from the main model's, which MTP shares here; it is left out")


def _read(
    pieces: Iterator[Piece], tensors: dict[str, tuple[Any, Path]], block: tuple[int, int] | None
) -> Iterator[tuple[Piece, Tensor]]:
    for piece in pieces:
        handle, _ = tensors[piece.name]
        tensor = handle.get_tensor(piece.name)
        if tensor.dtype == torch.float8_e4m3fn and tensor.ndim == 2:
            scale, _ = tensors[f"{piece.name}_scale_inv"]
            tensor = dequantise(tensor, scale.get_tensor(f"{piece.name}_scale_inv"), block or BLOCK)
        yield piece, tensor


def _header(view: Any) -> tuple[tuple[int, ...], str]:
    return tuple(view.get_shape()), view.get_dtype()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
