"""What of a model is trained, and what is written when that is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bitnet_triton.attention import AttentionPlan
from bitnet_triton.models import BitNetConfig, BitNetForCausalLM, merge_adapters, set_attention
from bitnet_triton.models.checkpoint import keeps_masters
from bitnet_triton.models.convert import convert_checkpoint
from bitnet_triton.models.quantizer import in_memory
from bitnet_triton.training.documents import Document
from bitnet_triton.training.fit import mean_loss
from bitnet_triton.training.jobs import Adaptation, TrainingJob
from bitnet_triton.training.options import write_whole
from bitnet_triton.training.packing import PackingCollator
from bitnet_triton.training.transfer import Progress, transfer

# Keeps codes that are written as masters, and those that are packed, in one format of checkpoints
_TERNARY = {
    "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online",
}  # fmt: skip


class Trainee:
    """A model in the state that a job trains it in.

    Args:
        job: says what is trained.
        base: folder of the model.
        plan: how it attends.
        output: folder of the run.
    """

    def __init__(self, job: TrainingJob, base: str, plan: AttentionPlan, output: Path) -> None:
        self.job, self.base, self.plan, self.output = job, base, plan, output

    @property
    def what(self) -> str:
        """Return what is trained: "adapters", "module" (what a mode brings alone), "weights"."""
        if any(mode.trains == "module" for mode in self.plan):
            return "module"
        return "adapters" if isinstance(self.job, Adaptation) and self.job.lora else "weights"

    def check(self) -> None:
        """Refuse what cannot be trained, before a model is loaded.

        Raises:
            ImportError: adapters need peft, which is not installed.
            ValueError: a mode has no gradient, or brings weights that adapters do not hold.
        """
        config = BitNetConfig.from_pretrained(self.base)
        for mode in self.plan:
            if mode.trains == "nothing":
                raise ValueError(
                    f"`attention`: {mode.name!r} has no gradient; there is nothing to train"
                )
        if self.what == "adapters":
            if any(mode.module(config) is not None for mode in self.plan):
                raise ValueError(
                    "`lora`: the attention brings weights of its own, which adapters do not hold; "
                    "train all weights (`lora: false`, --full)"
                )
            _peft()
        if getattr(self.job, "transfer", 0) and not self._learns_from_layers(config):
            raise ValueError(
                "`transfer`: expected a mode that brings weights and is trained by the model's "
                f"loss, got {', '.join(sorted({mode.name for mode in self.plan}))}"
            )

    def _learns_from_layers(self, config: BitNetConfig) -> bool:
        modules = [mode.module(config) for mode in self.plan]
        return self.what == "weights" and any(
            module is not None and next(module.parameters(), None) is not None for module in modules
        )

    def load(self) -> nn.Module:
        """Return the model with its plan; what is trained requires a gradient, nothing else."""
        torch.manual_seed(self.job.seed)  # adapters and modules of modes begin at random
        if getattr(self.job, "scratch", False):
            model = self._random()
        elif self.what != "adapters":  # without which Trainer takes no packed model
            model = BitNetForCausalLM.from_pretrained(self._masters(), dtype=torch.float32)
        else:
            model = BitNetForCausalLM.from_pretrained(self.base, fuse=False)
        set_attention(model, self.plan.to_config()).to(device())
        if self.what == "module":
            self._freeze_all_but_modules(model)
        return self._with_adapters(model) if self.what == "adapters" else model

    def transfer(self, model: Any, documents: list[Document], tell: Progress) -> list[float]:
        """Let what modes bring along learn from the attention of ``base``; once a run.

        Returns:
            The error of each step, as ``transfer`` of the module of that name has it.
        """
        job, path = self.job, self.output / "transferred.safetensors"
        assert isinstance(job, Adaptation)
        told = path.with_suffix(".json")
        own = {name: p for name, p in model.named_parameters() if self._is_brought(name)}
        if not told.exists():
            teacher = BitNetForCausalLM.from_pretrained(self._masters(), dtype=torch.float32)
            set_attention(teacher, teacher.config.attention or "full").to(device()).eval()
            errors = transfer(
                model, teacher, documents * job.transfer, row=job.row or job.length,
                rate=job.transfer_rate, progress=tell,
            )  # fmt: skip
            save_file({name: p.detach().cpu().contiguous() for name, p in own.items()}, path)
            write_whole(told, json.dumps(errors) + "\n")  # last: it says that both are there
        with torch.no_grad():
            for name, value in load_file(path).items():
                own[name].copy_(value)
        return json.loads(told.read_text(encoding="utf-8"))

    def _masters(self) -> Path:
        """Return a folder with trainable weights: ``base``, where it has them."""
        if keeps_masters(BitNetConfig.from_pretrained(self.base)):
            return Path(self.base)
        masters = self.output / "masters"
        if not masters.exists():
            convert_checkpoint(self.base, masters, to="masters", dtype=torch.float32)
        return masters

    def _random(self) -> Any:
        config = BitNetConfig.from_pretrained(self.base)
        config.attention, config.quantization_config = None, in_memory(_TERNARY)
        return BitNetForCausalLM(config).float()

    def _freeze_all_but_modules(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = self._is_own(name)

    def _is_brought(self, name: str) -> bool:
        return any(f".self_attn.{mode.name}." in name for mode in self.plan)

    def _is_own(self, name: str) -> bool:
        return any(f".{mode.name}." in name for mode in self.plan if mode.trains == "module")

    def _with_adapters(self, model: Any) -> nn.Module:
        job, peft = self.job, _peft()
        assert isinstance(job, Adaptation)
        lora = peft.LoraConfig(
            r=job.rank, lora_alpha=job.alpha, target_modules=list(job.targets),
            task_type="CAUSAL_LM",
        )  # fmt: skip
        try:
            return peft.get_peft_model(model, lora)
        except ValueError as error:
            raise ValueError(f"`targets`: {' '.join(str(error).split())}") from error

    def try_step(self) -> None:
        """Find out whether the model can be trained so, with two short documents.

        Raises:
            ValueError: it cannot; the message says why.
        """
        model: Any = self.load().train()
        ids = list(range(3, 40))
        document = {"input_ids": ids, "labels": [-100] * 24 + ids[24:], "prompt_len": 24}
        batch = PackingCollator(tell_prompts=True)([document, document])
        there = {k: v.to(model.device) if hasattr(v, "to") else v for k, v in batch.items()}
        try:
            model(**there, skip_logits=True).loss.backward()
        except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
            reason = str(error).removeprefix("`attention`: ")
            raise ValueError(
                f"`attention`: cannot be trained on packed documents: {reason}"
            ) from error

    def save(
        self, model: Any, folder: Path, documents: list[Document], held_out: list[Document]
    ) -> dict[str, float | None] | None:
        """Write the trained model; return what merging its adapters has changed, if it has.

        Args:
            model: from ``load``, trained.
            folder: a new one.
            documents: one of them tells how far merging changes the logits.
            held_out: to measure the loss of the merged model on.
        """
        if self.what == "module" and not keeps_masters(BitNetConfig.from_pretrained(self.base)):
            packed = self._packed()  # whose other tensors stay as they are, bit for bit
            found = {name: p for name, p in packed.named_parameters() if self._is_own(name)}
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in found:
                        found[name].copy_(parameter)
            packed.save_pretrained(folder)
        elif self.what != "adapters":
            self._save_packed(model, folder)
        elif isinstance(self.job, Adaptation) and self.job.merge:
            with new_folder(self.output / "beside") as kept:
                self._save_beside(model, kept, self.output / "beside")
            return self._save_merged(model, folder, documents, held_out)
        else:
            self._save_beside(model, folder, self.output / "model")
        return None

    def _packed(self) -> Any:
        model = BitNetForCausalLM.from_pretrained(self.base, fuse=False)
        return set_attention(model, self.plan.to_config())

    def _forget_full(self, model: Any) -> Any:
        """Leave full attention out of a config: transformers reads the checkpoint without us."""
        if self.plan.to_config() == {"mode": "full"}:
            model.config.attention = None
        return model

    def _save_packed(self, model: Any, folder: Path) -> None:
        trained, packed = self.output / "trained", folder / "packed"
        shutil.rmtree(trained, ignore_errors=True)
        self._forget_full(model).save_pretrained(trained)
        convert_checkpoint(trained, packed, to="packed", dtype=torch.bfloat16)
        for path in packed.iterdir():
            path.replace(folder / path.name)
        packed.rmdir()

    def _save_merged(
        self, model: Any, folder: Path, documents: list[Document], held_out: list[Document]
    ) -> dict[str, float | None]:
        merged = merge_adapters(model, input_ids=torch.tensor([documents[0]["input_ids"]]))
        self._forget_full(merged.model).save_pretrained(folder)
        codes = merged.changed_codes.values()
        return {
            "logits_change": merged.logits_change, "changed_codes": sum(codes) / len(codes),
            "loss": mean_loss(merged.model, held_out, self.job.schedule.row),
        }  # fmt: skip

    def _save_beside(self, model: Any, folder: Path, final: Path) -> None:
        self._forget_full(self._packed()).save_pretrained(folder)
        # a folder with a model and adapters gives both, and the model from there
        for kind in model.peft_config.values():
            kind.base_model_name_or_path = str(final.absolute())
        model.save_pretrained(folder, save_embedding_layers=False)


def device() -> torch.device:
    """Return where a model is trained: the accelerator, where there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder that becomes ``target`` when the block ends well."""
    partial = target.with_name(target.name + ".partial")
    for path in (partial, target):
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.replace(target)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("`lora`: adapters need peft: install bitnet-triton[train]") from error
    return peft
