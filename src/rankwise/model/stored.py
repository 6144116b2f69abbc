"""Loading an adapted model's adapters, and saving them."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from rankwise import storage
from rankwise.attach.attachment import Attachment, check_compute_dtype, plain_state, set_compute_dtype
from rankwise.attach.precision import in_base_dtype
from rankwise.attach.targets import modules_to_save_paths
from rankwise.config import CONFIG_NAME
from rankwise.config.checks import check_flag
from rankwise.files.hub import find_adapter_folder
from rankwise.model.named import NamesAdapters
from rankwise.model.options import LoadOptions, check_save_options, load_options
from rankwise.parallel import zero
from rankwise.parallel.flattened import refuse_flattened
from rankwise.parallel.processes import all_wait_for_this, writes_files
from rankwise.parallel.sharded import shared_out

_NOT_GIVEN = object()


class StoresAdapters(NamesAdapters):
    """The part of an adapted model that reads and writes adapter folders."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        selected_adapters: list[str] | None = None,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool | None = None,
        training_state: bool | None = None,
        save_embedding_layers: bool | str = "auto",
        safe_serialization: bool = True,
        variant: Any = _NOT_GIVEN,
        **unused: Any,
    ) -> None:
        """Save the adapters in PEFT's format. The base model is not saved.

        The adapter "default" goes into the folder itself, any other into a sub-folder of its name. The folder is
        replaced as a whole or not at all.

        With many processes, only the first writes. If the parameters are sharded (``fully_shard``, ZeRO-3), all
        processes must call this together; they continue once the folder is complete.

        Args:
            save_directory: the folder, which is made if it does not exist.
            selected_adapters: names of the adapters to save. None: all.
            state_dict: whole state dictionary of the model, if the processes hold only parts of it. None: the model's.
            is_main_process: whether this process writes. None: the first process writes.
            training_state: whether to save the state that continues the run. None: only while a run is under way.
            save_embedding_layers: whether to save the base weights of a Transformers model's input and output
                embeddings, which is needed after the vocabulary was resized. True, False, or "auto" for those that
                are adapted, as in PEFT.
            safe_serialization: False writes ``adapter_model.bin``, a pickle, for programs that cannot read safetensors.
                `compress_adapter` and the exports cannot read it.
            variant: an argument for whole models, which diffusers' pipelines pass. Adapters have no variants.
            unused: other arguments of PEFT's and Transformers' ``save_pretrained``, without effect here.

        Raises:
            TypeError: an argument is unknown.
            ValueError: an adapter does not exist, an option has an impossible value, or a pipeline of diffusers is
                being saved, which needs whole models. Or a tensor holds NaN or infinite values, which nothing could
                load: the message then names the last good checkpoint nearby. Nothing is written, so that a trainer
                stops at its next checkpoint.
            OSError: the folder cannot be written. Its old content is then unchanged.
        """
        if variant is not _NOT_GIVEN and _of_diffusers(self):
            raise ValueError(
                f"A pipeline is saved with whole models, but its {type(self).__name__} has adapters of rankwise. For "
                "the adapter, call `export_adapter(folder, model, 'diffusers')`, which `pipe.load_lora_weights` takes. "
                "For a pipeline with the adapter in its weights, set `model = model.merge_and_unload()` in it first."
            )
        if state_dict is None:
            refuse_flattened(
                self,
                "save_pretrained",
                "Call `FSDP.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT)` in all processes, and pass "
                "`state_dict=wrapped.state_dict()`; or use `fully_shard` (FSDP version 2).",
            )
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
        check_flag("safe_serialization", safe_serialization)
        if variant is not _NOT_GIVEN:
            unused = {**unused, "variant": variant}
        check_save_options(unused, inspect.signature(StoresAdapters.save_pretrained).parameters)
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{str(folder)!r} is a file; give the name of a folder.")
        self._check_in_place()
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
                    self._save_one(folder, name, state, training_state, more, not safe_serialization)

    def _save_one(
        self,
        folder: Path,
        name: str,
        state_dict: dict[str, Tensor] | None,
        training_state: bool | None,
        more: dict[str, str],
        as_pickle: bool,
    ) -> None:
        controller = self._controller_of(name)
        state = plain_state(self.state_dict() if state_dict is None else state_dict)
        if storage.EXTRA_STATE not in state:  # DeepSpeed does not gather it
            state[storage.EXTRA_STATE] = self.get_extra_state()
        checkpoint = storage.checkpoint_step(folder) is not None
        if controller is not None and not checkpoint:
            controller.warn_if_unfinished()
        if training_state is None:
            if controller is not None:
                training_state = checkpoint or controller.under_way
            else:
                training_state = checkpoint and storage.trains_more(self, name)
        place = folder if name == "default" else folder / name
        config = self.peft_config[name]
        history = self._rankwise_histories.get(name)
        storage.write_adapter(
            place, self, name, config, controller, state, training_state, more, as_pickle, history
        )

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        adapter_compute_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Any:
        """Attach one more adapter from a folder or the hub. `set_adapter` makes it act.

        If the folder holds the state of a run and ``is_trainable`` is set, the adapter acts and trains at once.

        Args:
            model_id: an adapter folder, or a repository on the Hugging Face hub.
            adapter_name: name of the adapter in the model.
            is_trainable: whether the adapter trains.
            adapter_compute_dtype: dtype of the adapter's products, as for `get_peft_model`.
            options: as for `from_pretrained`.

        Returns:
            PyTorch's pair of ``missing_keys`` and ``unexpected_keys``, as in PEFT. Both are empty, since a file that
            does not fit is an error.

        Raises:
            FileNotFoundError: the adapter does not exist.
            TypeError: an option is unknown. The message suggests the nearest known one.
            ValueError: a file is broken, or belongs to another model. The model is then as before.
        """
        self._load("load_adapter", model_id, adapter_name, is_trainable, adapter_compute_dtype, options)
        return _IncompatibleKeys([], [])

    def _load(
        self,
        function: str,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool,
        adapter_compute_dtype: torch.dtype | None,
        given: dict[str, Any],
    ) -> None:
        check_compute_dtype(adapter_compute_dtype)
        check_flag("is_trainable", is_trainable)
        options = load_options(function, given)
        folder = find_adapter_folder(model_id, **options.hub)
        try:
            self._attach_file(folder, adapter_name, is_trainable, options)
        except ValueError as error:
            if options.config is None:
                raise
            raise ValueError(f"{error} (`config` was given, and replaces {folder / CONFIG_NAME}.)") from None
        set_compute_dtype(self, adapter_name, adapter_compute_dtype)

    def _attach_file(self, folder: Path, adapter_name: str, is_trainable: bool, options: LoadOptions) -> None:
        file = storage.read_adapter(folder, training_state=is_trainable, config=options.config)
        storage.take_present_names(self, file)
        if options.config is not None:  # a user's configuration may leave the heads to the task type
            heads = modules_to_save_paths(self, options.config)
            file.config = file.config_with(modules_to_save=heads or None)
        if file.training is None:
            attachment = storage.plan_from_file(self, file, adapter_name, is_trainable)
        else:
            attachment = storage.plan_from_training_state(self, file, adapter_name)
        if not options.autocast_adapter_dtype:
            attachment = in_base_dtype(self, attachment)
        with self._as_before_on_failure(attachment):
            self._attach(attachment)
            if file.training is not None:
                self._go_on(attachment, file)
            elif file.history is not None:
                self._rankwise_histories[adapter_name] = file.history

    def _go_on(self, attachment: Attachment, file: storage.AdapterFile) -> None:
        name = attachment.adapter
        self.set_adapter(name)
        for path in attachment.biases:  # biases and other parameters that trained with the adapter
            self.get_parameter(path).requires_grad_(True)
        storage.prepare_training_state(self, name, file, self._controller_of(name))()

    def load_checkpoint(self, folder: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """Load a checkpoint folder into adapters that are attached already.

        If the folder holds the state of a run, the run continues from there, bit for bit. Otherwise only the adapter's
        values are loaded, and AdaLoRA's ranks stay as they are in the folder.

        Args:
            folder: folder that `save_pretrained` wrote.
            adapter_name: name of the adapter to load into. None: those that train or act.

        Raises:
            FileNotFoundError: the folder holds no such adapter.
            ValueError: a file is broken or belongs to another adapter, an adapter is merged, or DeepSpeed ZeRO holds
                the model. Nothing has changed.
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
        storage.take_present_names(self, file)
        if file.training is not None:
            return storage.prepare_training_state(self, name, file, controller)
        if controller is not None:
            warnings.warn(
                f"{place} holds no {storage.TRAINING_STATE_NAME}, so the run does not continue: only the adapter's "
                "values are loaded, and its ranks stay as they are in the folder.",
                stacklevel=3,
            )
        return storage.prepare_values(self, name, file, controller)


def _of_diffusers(model: Any) -> bool:
    return any(each.__module__.partition(".")[0] == "diffusers" for each in type(model).__mro__)
