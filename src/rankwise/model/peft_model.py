"""What an adapted model can do: the methods that `get_peft_model` gives to the user's own model."""

from __future__ import annotations

import os
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rankwise import storage
from rankwise.adapters.inplace import InPlace, add_methods, remove_methods
from rankwise.adapters.quantized import hold_layout, release_layout
from rankwise.attach.attachment import (
    Attachment,
    adapter_layers,
    apply_attachment,
    detach,
    detach_all,
    follow,
    plain_state,
    plan_attachment,
    refuse_overlap,
    saved_modules,
    train_biases,
)
from rankwise.attach.merging import merge, refuse_sharded, refuse_shared_copies
from rankwise.config import AdaLoraConfig, LoraConfig
from rankwise.files.hub import find_adapter_folder
from rankwise.model.state import CarriesRun
from rankwise.parallel import zero
from rankwise.parallel.processes import all_wait_for_this, shared_out, writes_files
from rankwise.run.controller import BUFFERS, Controller
from rankwise.run.history import RankHistory
from rankwise.run.state import AllocationState
from rankwise.run.summary import LayerRank, RankSummary

_ATTRIBUTES = (
    "peft_config",
    "_rankwise_controller",
    "_rankwise_histories",
    "_ddp_params_and_buffers_to_ignore",
    "_hf_peft_config_loaded",
)

_CHECKPOINT = re.compile(r"checkpoint-\d+")  # what Transformers and others call a folder to go on from


class PeftModel(InPlace, CarriesRun):
    """Mixin that an adapted model's class is made of; see `get_peft_model`.

    The model stays what it is: the same object, still an instance of its own class, with its own ``forward``,
    ``generate`` and so on. The names of these methods are PEFT's.
    """

    peft_config: dict[str, LoraConfig]
    _rankwise_histories: dict[str, RankHistory]

    # Loading and saving.

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        model_id: Any = None,
        adapter_name: str = "default",
        is_trainable: bool = False,
        **options: Any,
    ) -> Any:
        """Attach the adapter in a folder to a base model, in place, and return the model.

        Args:
            model: the base model.
            model_id: an adapter folder, or a repository on the Hugging Face hub (needs ``huggingface_hub``).
            adapter_name: the name it gets, "default" if left out.
            is_trainable: whether to train it on. If the folder holds the state of an unfinished run, the run
                goes on from there. Otherwise the model is put into evaluation mode.
            options: ``revision``, ``subfolder``, ``cache_dir``, ``token`` for the hub.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: a file is broken, or belongs to another model; the model is then as before.

        Example:
            >>> import tempfile, torch, rankwise as rw
            >>> layers = lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
            >>> config = rw.LoraConfig(r=2, target_modules=["0"])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     rw.get_peft_model(layers(), config).save_pretrained(folder)
            ...     model = rw.PeftModel.from_pretrained(layers(), folder)
            >>> model.active_adapters
            ['default']
        """
        if cls is PeftModel:
            return _load_into_base(model, model_id, adapter_name, is_trainable, **options)
        own: Any = super()  # called on an adapted model's class: its own way to load a base model
        return own.from_pretrained(model, *([] if model_id is None else [model_id]), **options)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        selected_adapters: list[str] | None = None,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool | None = None,
        training_state: bool | None = None,
        save_embedding_layers: bool | str = "auto",
        **unused: Any,
    ) -> None:
        """Save the adapters in PEFT's format; the base model is not saved.

        The adapter "default" goes into the folder itself, any other into a sub-folder of its name. The folder is
        replaced as a whole or not at all.

        With many processes, only the first writes. If they share out the parameters (``fully_shard``, ZeRO-3), all of
        them must call this together; they go on when the folder is complete.

        Args:
            save_directory: made if need be.
            selected_adapters: names; all if None.
            state_dict: the model's whole state dictionary, from processes that each hold a part of it.
            is_main_process: whether this process writes. None: if it is the first of all.
            training_state: also write what continuing the run needs. None: if a run is under way.
            save_embedding_layers: also write the base weights of a Transformers model's input and output
                embeddings, as is needed after the vocabulary was resized: True, False, or "auto" for those that
                are adapted, as in PEFT.
            unused: other arguments of PEFT's and Transformers' ``save_pretrained`` that have no meaning here.

        Raises:
            ValueError: there is no adapter of a selected name, or an option has an impossible value.
            OSError: it can't be written; what was there before is whole.
        """
        writes = writes_files() if is_main_process is None else is_main_process
        sharded = state_dict is None and shared_out(self)
        if not (writes or sharded):
            return
        if state_dict is not None and not state_dict and shared_out(self):
            warnings.warn(
                f"No adapter is written to {str(save_directory)!r}: the trainer has gathered no weights. Set "
                '"stage3_gather_16bit_weights_on_model_save" under "zero_optimization" in DeepSpeed\'s configuration, '
                "or call `model.save_pretrained(folder)` in all processes.",
                stacklevel=2,
            )
            return
        if unused.get("safe_serialization") is False:
            raise ValueError("Adapters are only saved as safetensors: leave `safe_serialization` out.")
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{str(folder)!r} is a file; give the name of a folder.")
        names = selected_adapters or list(self.peft_config)
        for name in names:
            self._check_name(name)
        for name in names:
            bias = self.peft_config[name].bias
            more = storage.embedding_keys(self, name, save_embedding_layers)
            if more:
                self._refuse_merged()
            state = storage.gathered_state(self, name, bias, more) if sharded else state_dict
            with all_wait_for_this() if sharded else nullcontext():
                if writes:
                    self._save_one(folder, name, state, training_state, more)

    def _save_one(
        self,
        folder: Path,
        name: str,
        state_dict: dict[str, Tensor] | None,
        training_state: bool | None,
        more: dict[str, str],
    ) -> None:
        controller = self._controller_of(name)
        state = plain_state(self.state_dict() if state_dict is None else state_dict)
        state.setdefault(
            storage.EXTRA_STATE, self.get_extra_state()
        )  # DeepSpeed leaves it out of what it gathers
        checkpoint = _CHECKPOINT.fullmatch(folder.name) is not None
        if controller is not None and not checkpoint:
            controller.tell_if_unfinished()
        if training_state is None:
            goes_on = controller is not None or storage.trains_more(self, name)
            training_state = (checkpoint and goes_on) or (controller is not None and controller.under_way)
        place = folder if name == "default" else folder / name
        config = self.peft_config[name]
        storage.write_adapter(place, self, name, config, controller, state, training_state, more)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        **hub_options: Any,
    ) -> None:
        """Attach one more adapter from a folder or the hub; `set_adapter` makes it act.

        One whose run goes on (``is_trainable``, and the folder holds the state of a run) acts and trains at once.

        Raises: as `from_pretrained`.
        """
        file = storage.read_adapter(find_adapter_folder(model_id, **hub_options), training_state=is_trainable)
        if file.training is None:
            attachment = storage.plan_from_file(self, file, adapter_name, is_trainable)
        else:
            attachment = storage.plan_from_training_state(self, file, adapter_name)
        with self._as_before_on_failure(attachment):
            self._attach(attachment)
            if file.training is not None:
                self._go_on(attachment, file)
            elif file.history is not None:
                self._rankwise_histories[adapter_name] = file.history

    def _go_on(self, attachment: Attachment, file: storage.AdapterFile) -> None:
        name = attachment.adapter
        self.set_adapter(name)
        for path in attachment.biases:  # and whatever else trained beside the adapter
            self.get_parameter(path).requires_grad_(True)
        storage.prepare_training_state(self, name, file, self._controller_of(name))()

    def load_checkpoint(self, folder: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """Bring adapters that are attached already to what a checkpoint folder holds.

        With the state of a run in the folder, the run goes on from there, bit for bit; otherwise only the
        adapter's values are taken over, and AdaLoRA's ranks stay as they are in it.

        Args:
            folder: what `save_pretrained` wrote.
            adapter_name: None: those that train or act.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: a file is broken or of another adapter, an adapter is merged, or DeepSpeed ZeRO holds the
                model. Nothing has changed then.
        """
        self._refuse_merged()
        if any(map(zero.partitioned, self.parameters())):
            raise ValueError(
                "DeepSpeed ZeRO trains copies of the adapter's parameters, which `load_checkpoint` doesn't reach. Call "
                "it before `deepspeed.initialize`, or load a checkpoint of DeepSpeed's with `engine.load_checkpoint`."
            )
        trained = self._rankwise_controller.adapter if self._rankwise_controller else None
        names = dict.fromkeys(name for name in (trained, *self.active_adapters) if name is not None)
        loads = [self._prepare(Path(folder), name) for name in ([adapter_name] if adapter_name else names)]
        if not loads:
            raise ValueError("The model has no adapter that trains or acts.")
        for load in loads:
            load()

    def _prepare(self, folder: Path, name: str) -> Callable[[], None]:
        self._check_name(name)
        own = folder / name
        place = own if name != "default" and own.is_dir() else folder
        file, controller = storage.read_adapter(place, training_state=True), self._controller_of(name)
        if file.training is not None:
            return storage.prepare_training_state(self, name, file, controller)
        if controller is not None:
            warnings.warn(
                f"{place} holds no {storage.TRAINING_STATE_NAME}, so this is not the run going on: the adapter's "
                "values are taken over, and its ranks stay as they are there.",
                stacklevel=3,
            )
        return storage.prepare_values(self, name, file, controller)

    # Adapters by name.

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act."""
        layers = adapter_layers(self)
        if layers:
            return list(next(iter(layers.values())).active_adapters)
        return [name for module in saved_modules(self).values() if (name := module.active_adapter)][:1]

    @property
    def active_adapter(self) -> str | None:
        """Name of the adapter that acts."""
        return next(iter(self.active_adapters), None)

    @property
    def active_peft_config(self) -> LoraConfig:
        """Configuration of the adapter that acts."""
        return self.peft_config[self._trained_or_active()]

    @property
    def base_model(self) -> nn.Module:
        """The model itself, or what the model's own class calls its base model."""
        own: Any = self._modules.get("base_model", self.__dict__.get("base_model"))
        if own is None:
            own = getattr(super(), "base_model", None)
        return self if own is None else own

    def get_base_model(self) -> nn.Module:
        """The model itself: rankwise puts nothing around it."""
        return self

    def add_adapter(self, adapter_name: str | LoraConfig, peft_config: LoraConfig | str = "default") -> None:
        """Add an untrained adapter; `set_adapter` makes it act and train.

        The arguments may come in PEFT's order (name, configuration) or in Transformers' (configuration, name).

        Raises:
            ValueError: the name is taken, the configuration does not fit, or another AdaLoRA adapter trains.
        """
        if isinstance(adapter_name, LoraConfig):
            adapter_name, peft_config = peft_config, adapter_name
        if not isinstance(adapter_name, str) or not isinstance(peft_config, LoraConfig):
            raise TypeError("`add_adapter` takes a name and a LoraConfig or AdaLoraConfig.")
        self._attach(plan_attachment(self, peft_config, adapter_name))

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Let one adapter act, or several together, and train if it is not for inference only.

        Raises:
            ValueError: there is no adapter of a name, or two of them have a copy of one module.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        for name in names:
            self._check_name(name)
        self._refuse_two_copies(names)
        if self._merged():
            warnings.warn(
                "Changing the acting adapter takes the merged one out of the weights.", stacklevel=2
            )
            self.unmerge_adapter()
        for layer in adapter_layers(self).values():
            layer.active_adapters = list(names)
            for name in layer.lora_A:
                trains = name in names and not inference_mode and not self.peft_config[name].inference_mode
                for key, parameter in layer.adapter_parameters(name).items():
                    parameter.requires_grad_(
                        trains and not (key == "lora_E" and self.peft_config[name].gated)
                    )
        for module in saved_modules(self).values():
            held = [name for name in names if name in module.modules_to_save]
            module.active_adapter = held[0] if held else None
            for name, copy in module.modules_to_save.items():
                trains = name in names and not inference_mode and not self.peft_config[name].inference_mode
                copy.requires_grad_(trains)
        for name, config in self.peft_config.items():
            train_biases(
                self, config, name, name in names and not inference_mode and not config.inference_mode
            )

    def _refuse_two_copies(self, names: list[str]) -> None:
        for path, module in saved_modules(self).items():
            held = [name for name in names if name in module.modules_to_save]
            if len(held) > 1:
                raise ValueError(
                    f"The adapters {held} can't act together: each has a copy of {path!r} in `modules_to_save`, and "
                    "only one copy can act."
                )

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the model is its base model."""
        before = self._adapters_enabled()
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if before:
                self.enable_adapter_layers()

    def disable_adapter_layers(self) -> None:
        """Let no adapter act, until `enable_adapter_layers`."""
        self._enable(False)

    def enable_adapter_layers(self) -> None:
        """Let the active adapters act again."""
        self._enable(True)

    disable_adapters = disable_adapter_layers  # Transformers' names
    enable_adapters = enable_adapter_layers

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. If it was the one that acts, the first of the others does."""
        self._check_name(adapter_name)
        if adapter_name in self._merged():
            self.unmerge_adapter()
        was_active = adapter_name in self.active_adapters
        train_biases(self, self.peft_config[adapter_name], adapter_name, False)
        if self._controller_of(adapter_name) is not None:
            self._drop_controller()
        detach(self, adapter_name)
        del self.peft_config[adapter_name]
        self._rankwise_histories.pop(adapter_name, None)
        if was_active and self.peft_config and not self.active_adapters:
            self.set_adapter(next(iter(self.peft_config)))

    # Merging.

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add the active (or named) adapters' updates to the base weights; `unmerge_adapter` takes them out.

        Raises:
            ValueError: a weight is shared with another module, which would change too, or can't be merged into;
                or ``safe_merge`` and a merged weight would not be finite. The model is then as before.

        Warns:
            UserWarning: base weights are quantized, so that what is merged is rounded.
        """
        merge(self, self._checked_names(adapter_names), safe_merge)

    def unmerge_adapter(self) -> None:
        """Take merged updates out of the base weights again."""
        for layer in adapter_layers(self).values():
            layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """Merge for good: the model gets back its own class and plain layers, and is returned.

        Args:
            progressbar: accepted as in PEFT; merging shows none.
            safe_merge: refuse to merge NaN or infinite values.
            adapter_names: the active ones if None.

        Raises: as `merge_adapter`.
        """
        refuse_sharded(self, "merge_and_unload")
        names = self._checked_names(adapter_names)
        refuse_shared_copies(self, names)
        merge(self, names, safe_merge, for_good=True)
        return self._strip(keep_saved=names)

    def unload(self) -> Any:
        """Remove all adapters: the model is its base model again, and is returned."""
        refuse_sharded(self, "unload")
        self.unmerge_adapter()
        return self._strip()

    # What trains.

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(Parameters that train, all parameters)."""
        sizes = [(p.numel() * _packing(p), p.requires_grad) for p in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    # AdaLoRA.

    def update_and_allocate(self, global_step: int) -> None:
        """Score and allocate for optimizer step ``global_step`` (from 1), as PEFT scripts do.

        Not needed: it happens by itself. From the first call on, it happens only at these calls, which belong
        between ``optimizer.step()`` and ``zero_grad()``.

        Raises:
            ValueError: no AdaLoRA adapter trains, or ``total_step`` is not known.
        """
        self._controller_or_refuse().update_and_allocate(global_step)

    def set_total_step(self, total_step: int) -> None:
        """Tell the schedule how many optimizer steps the run has.

        Raises:
            ValueError: no AdaLoRA adapter trains, or the schedule's phases do not fit into so many steps.
        """
        self._controller_or_refuse().set_total_step(total_step)

    def finalize_ranks(self) -> None:
        """Bring the budget to its target now, by the scores as they are, and keep that choice.

        For a run that ends before its schedule does.

        Raises:
            ValueError: no AdaLoRA adapter trains, or it is merged.
        """
        controller = self._controller_or_refuse()
        self._refuse_merged()
        controller.finalize_ranks()

    @property
    def allocation_state(self) -> AllocationState | None:
        """Step, phase and budget of the AdaLoRA adapter that trains, or None if there is none."""
        return self._rankwise_controller.state() if self._rankwise_controller else None

    @property
    def rank_history(self) -> RankHistory | None:
        """The budget and every layer's rank at each allocation; also of an adapter loaded with its history."""
        if self._rankwise_controller:
            return self._rankwise_controller.history
        return self._rankwise_histories.get(self.active_adapter or "")

    def rank_summary(self) -> RankSummary:
        """Rank, importance and parameters of every adapted layer, of the adapter that trains or acts.

        ``print`` shows it as a table.
        """
        name = self._trained_or_active()
        controller = self._controller_of(name)
        layers = adapter_layers(self, name)
        config = self.peft_config[name]
        allocated = controller.allocated_ranks() if controller else {}
        scores = controller.layer_importance() if controller else [float("nan")] * len(layers)
        rows = []
        for (path, layer), score in zip(layers.items(), scores, strict=True):
            factors = layer.adapter_parameters(name)
            held = factors["lora_A"].shape[0]
            rank = allocated.get(path, held)
            start = config.init_r if isinstance(config, AdaLoraConfig) else held
            size = sum(p.numel() for p in factors.values())
            rows.append(LayerRank(path, rank, start, score, size * rank // held if held else 0))
        return RankSummary(rows, budget=sum(row.init_r for row in rows))

    def orthogonal_penalty(self) -> Tensor:
        """Mean of ||A Aᵀ - I||_F and ||Bᵀ B - I||_F over all layers, without its weight; a 0-dim tensor.

        Raises:
            ValueError: no AdaLoRA adapter trains.
        """
        return self._controller_or_refuse().penalty()

    # Inside.

    def _attach(self, attachment: Attachment) -> None:
        name, config = attachment.adapter, attachment.config
        adalora = isinstance(config, AdaLoraConfig) and not config.inference_mode
        if adalora and self._rankwise_controller is not None:
            raise ValueError(
                f"The AdaLoRA adapter {self._rankwise_controller.adapter!r} trains already, and only one can. "
                f"Add {name!r} with `inference_mode=True`, or delete the other first."
            )
        self._refuse_shared_biases(name, config)
        refuse_overlap(self, attachment)
        active, enabled = self.active_adapters, self._adapters_enabled()
        with self._as_before_on_failure(attachment):
            apply_attachment(self, attachment)
            self.peft_config[name] = config
            if not config.inference_mode:
                _install_integrations(self)
                hold_layout(self)
            if getattr(self, "is_quantized", False):
                self._hf_peft_config_loaded = True  # without it, Trainer refuses to train a quantized model
            if adalora:
                layers = adapter_layers(self, name)
                self._rankwise_controller = Controller(self, layers, name, config)  # type: ignore[arg-type]
                self._ddp_params_and_buffers_to_ignore = list(BUFFERS)
            if active:
                follow(self, name, active, enabled)
            else:
                self.set_adapter(name)

    def _refuse_shared_biases(self, name: str, config: LoraConfig) -> None:
        for other, its_config in self.peft_config.items():
            if config.bias != "none" and its_config.bias != "none":
                raise ValueError(
                    f"{other!r} has bias={its_config.bias!r}, and {name!r} bias={config.bias!r}: both would change "
                    "the base model's own biases. Set `bias` to 'none' for one of them."
                )

    @contextmanager
    def _as_before_on_failure(self, attachment: Attachment) -> Iterator[None]:
        """If what is within fails, take the adapter out again, and leave the model as it was."""
        name = attachment.adapter
        trained = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        active = [(layer, list(layer.active_adapters)) for layer in adapter_layers(self).values()]
        copies = [(module, module.active_adapter) for module in saved_modules(self).values()]
        values = [(p, p.detach().clone()) for p in map(self.get_parameter, attachment.biases)]
        try:
            yield
        except BaseException:
            if self._controller_of(name) is not None:
                self._drop_controller()
            detach(self, name)
            self.peft_config.pop(name, None)
            self._rankwise_histories.pop(name, None)
            for layer, names in active:
                layer.active_adapters = names
            for module, was in copies:
                module.active_adapter = was
            for parameter, value in values:
                parameter.data.copy_(value)
            for parameter, trains in trained:
                parameter.requires_grad_(trains)
            raise

    def _controller_of(self, adapter_name: str) -> Controller | None:
        controller = self._rankwise_controller
        return controller if controller and controller.adapter == adapter_name else None

    def _controller_or_refuse(self) -> Controller:
        if self._rankwise_controller is None:
            raise ValueError("No AdaLoRA adapter trains on this model: attach one with an AdaLoraConfig.")
        return self._rankwise_controller

    def _drop_controller(self) -> None:
        if self._rankwise_controller is not None:
            self._rankwise_controller.detach()
            self._rankwise_controller = None
            del self._ddp_params_and_buffers_to_ignore

    def _trained_or_active(self) -> str:
        if self._rankwise_controller is not None:
            return self._rankwise_controller.adapter
        name = self.active_adapter
        if name is None:
            raise ValueError("The model has no active adapter.")
        return name

    def _checked_names(self, names: list[str] | None) -> list[str]:
        for name in names or ():
            self._check_name(name)
        return names or self.active_adapters

    def _check_name(self, name: str) -> None:
        if name not in self.peft_config:
            raise ValueError(f"There is no adapter {name!r}; the model has {sorted(self.peft_config)}.")

    def _merged(self) -> list[str]:
        return next(
            (layer.merged_adapters for layer in adapter_layers(self).values() if layer.merged_adapters), []
        )

    def _refuse_merged(self) -> None:
        if self._merged():
            raise ValueError(
                "Call `unmerge_adapter` first: what is merged into the base weights would stay there."
            )

    def _adapters_enabled(self) -> bool:
        layers, saved = adapter_layers(self).values(), saved_modules(self).values()
        return all(layer.adapters_enabled for layer in layers) and all(m.adapters_enabled for m in saved)

    def _enable(self, enabled: bool) -> None:
        if not enabled and self._merged():
            warnings.warn("Disabling a merged adapter takes it out of the base weights.", stacklevel=3)
            self.unmerge_adapter()
        trained = [name for name, config in self.peft_config.items() if config.bias != "none"]
        if not enabled and trained:
            warnings.warn(
                f"The biases that adapter {trained[0]!r} has trained stay: they are the base model's own.",
                stacklevel=3,
            )
        for layer in adapter_layers(self).values():
            layer.adapters_enabled = enabled
        for module in saved_modules(self).values():
            module.adapters_enabled = enabled

    def _strip(self, keep_saved: Sequence[str] = ()) -> Any:
        self._drop_controller()
        release_layout(self)
        detach_all(self, keep_saved)
        for name in _ATTRIBUTES:
            self.__dict__.pop(name, None)
        inner = self.__dict__.pop("_rankwise_inner", None)
        if inner is not None:
            inner.__dict__.pop("update_and_allocate", None)
        remove_methods(self)
        return self


def get_peft_model(model: Any, peft_config: LoraConfig, adapter_name: str = "default", **unused: Any) -> Any:
    """Attach an adapter to ``model``, in place, and return ``model``.

    Only the adapted layers change; all other parameters are frozen. The model stays an instance of its own
    class and gets the methods of `PeftModel`. AdaLoRA's ranks allocate themselves whenever an optimizer that
    holds the adapter's parameters steps.

    Args:
        model: any ``nn.Module``.
        peft_config: an `AdaLoraConfig` or a `LoraConfig`.
        adapter_name: the adapter's name.
        unused: ``mixed``, ``autocast_adapter_dtype``, ``revision`` and ``low_cpu_mem_usage``, as in PEFT, at
            their defaults.

    Raises:
        TypeError: not a module or not such a configuration.
        ValueError: nothing matches ``target_modules``, or something that can't be adapted; the model is then as
            before.

    Example:
        >>> import torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> config = rw.AdaLoraConfig(init_r=4, target_r=2, total_step=10, tfinal=2, target_modules=["0", "2"])
        >>> model = rw.get_peft_model(model, config)
        >>> model.print_trainable_parameters()
        trainable params: 104 || all params: 202 || trainable%: 51.4851
        >>> isinstance(model, torch.nn.Sequential)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, but is a {type(model).__name__}.")
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(
            f"`peft_config` must be a rankwise LoraConfig or AdaLoraConfig, but is a {type(peft_config).__name__}"
            f"{' of another library' if hasattr(peft_config, 'peft_type') else ''}."
        )
    _check_unused(unused)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, peft_config)
        model.set_adapter(adapter_name)
        return model
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"This {type(model).__name__} has adapters of PEFT already. Take its base model "
            "(`model.unload()`, or `model.get_base_model()` before it was adapted)."
        )
    attachment = plan_attachment(model, peft_config, adapter_name)
    adapted = _make_peft_model(model)
    try:
        adapted._attach(attachment)
    except BaseException:
        adapted._strip()
        raise
    return model


def _check_unused(options: dict[str, Any]) -> None:
    neutral = {
        "mixed": (False,),
        "autocast_adapter_dtype": (True,),
        "revision": (None,),
        "low_cpu_mem_usage": (True, False),
    }
    for name, value in options.items():
        if name not in neutral:
            raise TypeError(f"get_peft_model has no argument {name!r}.")
        if value not in neutral[name]:
            raise ValueError(f"`{name}={value!r}` is not supported: leave it out.")


def _make_peft_model(model: Any) -> PeftModel:
    model.peft_config, model._rankwise_controller, model._rankwise_histories = {}, None, {}
    add_methods(model, PeftModel)
    inner = model.base_model
    if inner is not model and isinstance(
        inner, nn.Module
    ):  # PEFT scripts call model.base_model.update_and_allocate
        inner.__dict__["update_and_allocate"] = _UpdateAndAllocate(model)
        model.__dict__["_rankwise_inner"] = inner
    adapted: PeftModel = model
    return adapted


class _UpdateAndAllocate:
    """The adapted model's `update_and_allocate`, for a part of it: holds the model weakly, so that it can be freed."""

    def __init__(self, model: Any) -> None:
        self._find: Callable[[], Any] = weakref.ref(model) if model is not None else lambda: None

    def __call__(self, global_step: int) -> None:
        model = self._find()
        if model is None:
            raise RuntimeError("The adapted model, of which this is a part, does not exist any more.")
        model.update_and_allocate(global_step)

    def __reduce__(self) -> Any:
        return _UpdateAndAllocate, (self._find(),)


def _install_integrations(model: nn.Module) -> None:
    kinds = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    if "transformers.modeling_utils" in kinds or "transformers.trainer" in sys.modules:
        try:
            from rankwise.integrations.transformers import install
        except ImportError:  # a Transformers without what its Trainer needs
            return
        install()


def _load_into_base(
    model: Any,
    model_id: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    **hub_options: Any,
) -> Any:
    if not isinstance(model, nn.Module):
        raise TypeError(f"The base model must be a torch.nn.Module, but is a {type(model).__name__}.")
    new = not isinstance(model, PeftModel)
    adapted = model if isinstance(model, PeftModel) else _make_peft_model(model)
    try:
        adapted.load_adapter(model_id, adapter_name, is_trainable, **hub_options)
        adapted.set_adapter(adapter_name)
        if not is_trainable:
            adapted.eval()
    except BaseException:
        if new:
            adapted._strip()
        raise
    return model


def _packing(parameter: nn.Parameter) -> int:
    """How many weights one element of a parameter holds: bitsandbytes packs two into a byte."""
    return 2 if type(parameter).__name__ == "Params4bit" and parameter.element_size() == 1 else 1
