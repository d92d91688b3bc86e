"""The weights of a base model, read tensor by tensor; those that bitsandbytes packed in 4 bit are unpacked."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from core.artefacts import tensors_of
from core.errors import FinetuiError

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
PACKED = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")
FP4_STATE = ".quant_state.bitsandbytes__fp4"
STATE = PACKED[-1]


class BaseWeights:
    """The safetensors weights of a model folder. One file is open at a time, and one tensor is in memory."""

    def __init__(self, folder: Path) -> None:
        """Raises FinetuiError for a folder without safetensors, a broken file, or a packing that cannot be read."""
        self.folder = folder
        self.headers = {file.name: tensors_of(file) for file in self._files()}
        self.place = {name: file for file, header in self.headers.items() for name in header}
        if not self.place:
            raise FinetuiError(f"{folder} holds no safetensors weights.", "Give the folder of a model.")
        strange = {entry["dtype"] for header in self.headers.values() for entry in header.values()} - set(TORCH_DTYPES)
        packed_otherwise = [name for name in self.place if name.endswith((FP4_STATE, "_blocks", "_scales"))]
        if strange or packed_otherwise:
            what = ", ".join(sorted(strange)) or packed_otherwise[0].rsplit(".", 1)[-1]
            raise FinetuiError(
                f"{folder.name} is quantised in a way that cannot be merged into ({what}).",
                "Name its 16-bit weights with --merge-base.",
            )
        self._open: tuple[str, Any] = ("", None)

    def _files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError) as error:
                raise FinetuiError(f"{index} cannot be read.", "Download or save the model again.") from error
            if wrong := [name for name in names if not (self.folder / name).is_file() or "/" in name]:
                raise FinetuiError(f"{self.folder} lacks {str(wrong[0])[:80]}.", "Download or save the model again.")
            return sorted(self.folder / name for name in names)
        return sorted(file for file in self.folder.glob("*.safetensors") if not file.name.startswith("adapter"))

    @cached_property
    def packed(self) -> set[str]:
        """Names of the tensors that are packed in 4 bit."""
        return {name.removesuffix(STATE) for name in self.place if name.endswith(STATE)}

    @property
    def names(self) -> list[str]:
        """Every tensor of the model in file order, without the companions of packed ones."""
        return [name for name in self.place if not name.endswith(PACKED)]

    def shape(self, name: str) -> list[int]:
        return list(self._state(name)["shape"]) if name in self.packed else list(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """The number format on disk; of a packed tensor that which it was packed from."""
        if name in self.packed:
            return getattr(torch, str(self._state(name).get("dtype", "bfloat16")), torch.bfloat16)
        return TORCH_DTYPES[self._entry(name)["dtype"]]

    def read(self, name: str) -> torch.Tensor:
        """The tensor; a packed one in float32."""
        return self._unpacked(name) if name in self.packed else self._tensor(name)

    def _entry(self, name: str) -> dict[str, Any]:
        return self.headers[self.place[name]][name]

    def _tensor(self, name: str) -> torch.Tensor:
        file = self.place[name]
        if self._open[0] != file:
            self._open = (file, safe_open(self.folder / file, framework="pt"))
        return self._open[1].get_tensor(name)

    def _state(self, name: str) -> dict[str, Any]:
        return json.loads(bytes(self._tensor(name + STATE).tolist()))

    def _unpacked(self, name: str) -> torch.Tensor:
        """NF4 with blocks of one scale each, the scales packed themselves (QLoRA, arXiv 2305.14314, section 3).

        Two values a byte, the high half first; ``quant_map`` gives the sixteen values.
        """
        state = self._state(name)
        scales = self._tensor(f"{name}.absmax")
        if f"{name}.nested_absmax" in self.place:
            fine, coarse = self._tensor(f"{name}.nested_quant_map"), self._tensor(f"{name}.nested_absmax")
            blocks = torch.arange(scales.numel()) // state["nested_blocksize"]
            scales = fine[scales.long()] * coarse[blocks] + state["nested_offset"]
        packed = self._tensor(name).flatten()
        halves = torch.stack((packed >> 4, packed & 15), dim=1).flatten()
        values = self._tensor(f"{name}.quant_map").float()[halves.int()]
        size, count = state["blocksize"], 1
        for length in state["shape"]:
            count *= length
        values = values[:count]
        whole = count // size * size
        values[:whole].view(-1, size).mul_(scales[: whole // size, None].float())
        if whole < count:
            values[whole:] *= float(scales[-1])
        return values.view(state["shape"])
