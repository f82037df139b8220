"""How a BitNet model is divided among processes, and saved by all of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bitnet_triton.models.tensor_parallel import check_division, check_saving, joined_state
from bitnet_triton.nn.divided import Processes


class Division:
    """What transformers calls where it distributes a model; first of the base classes of one.

    Attributes:
        processes: among which the model is divided; None: this one holds all of it.
    """

    processes: Processes | None = None

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh: Any) -> Any:
        """Take note of the processes that will hold ``model``; ``from_pretrained`` calls it."""
        if mesh is None or distributed_config.tp_size == 1:
            return super().maybe_distribute_model(  # type: ignore[misc]
                model, distributed_config, mesh
            )
        check_division(model, distributed_config)
        # transformers 5.23 hands several meshes over, 5.17 one
        get_mesh = getattr(mesh, "get_mesh", None)
        whole = mesh if get_mesh is None else get_mesh(("pp", "fsdp", "tp"))
        tp_mesh = whole["tp"] if whole.ndim > 1 else whole
        model.processes = Processes(tp_mesh.get_group())
        model.config.distributed_config = distributed_config
        model._device_mesh, model._tp_size = whole, distributed_config.tp_size
        model._mesh_manager, model._is_distributed_loading_by_transformers = mesh, True
        return model

    def gather_sharded_state_dict_for_save(
        self,
        model_to_save: Any,
        state_dict: dict[str, Tensor],
        distributed_config: Any,
        *,
        save_on_this_rank: bool = True,
    ) -> dict[str, Tensor]:
        """Return what is saved: the whole state, on the process that writes it."""
        if self.processes is None:
            return super().gather_sharded_state_dict_for_save(  # type: ignore[misc]
                model_to_save, state_dict, distributed_config, save_on_this_rank=save_on_this_rank
            )
        return joined_state(model_to_save, state_dict, keep=save_on_this_rank)

    def save_pretrained(
        self, *args: Any, distributed_checkpoint: bool = False, **kwargs: Any
    ) -> Any:
        """Save the model as transformers does; every process of a divided one calls it.

        Raises:
            ValueError: the model is divided and was loaded from master weights, which it does not
                keep, or ``distributed_checkpoint`` is asked for.
        """
        if self.processes is not None:
            check_saving(self, distributed_checkpoint=distributed_checkpoint)
        elif distributed_checkpoint:
            kwargs["distributed_checkpoint"] = True
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
