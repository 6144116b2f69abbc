"""Sharing an adapted model's adapters: their model card, and uploads to the Hugging Face hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.model.combined import CombinesAdapters
from rankwise.model.ranks import AllocatesRanks
from rankwise.model.stored import StoresAdapters
from rankwise.parallel.processes import writes_files
from rankwise.storage.card import CARD_NAME, Training, adapter_card, is_own, write_card


class SharesAdapters(StoresAdapters, CombinesAdapters, AllocatesRanks):
    """The part of an adapted model that shares its adapters with others."""

    def create_or_update_model_card(
        self, output_dir: str | os.PathLike[str], training: Training | None = None, tags: Sequence[str] = ()
    ) -> bool:
        """Write a model card, ``README.md``, into an adapter's folder.

        A README that a person wrote or changed is left as it is. The card names no license, since only the adapter's
        owner can choose one.

        Args:
            output_dir: folder of the adapter.
            training: description of the training. None: the card does not describe it.
            tags: additional tags for the hub.

        Returns:
            Whether the card was written.

        Raises:
            ImportError: ``huggingface_hub`` is missing.
            ValueError: no adapter acts or trains.
            OSError: the file cannot be written.

        Example:
            >>> import tempfile, torch, rankwise as rw
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
            >>> model = rw.get_peft_model(model, rw.LoraConfig(r=2, target_modules=["0"]))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     model.save_pretrained(folder)
            ...     model.create_or_update_model_card(folder)
            True
        """
        folder = Path(output_dir)
        text = adapter_card(
            self.active_peft_config,
            self.rank_summary(),
            model_class=self._class_in_transformers(),
            num_labels=self._labels(),
            training=training,
            tags=tags,
            name=folder.resolve().name,
        )
        return write_card(folder, text)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload an adapter",
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Sequence[str] = (),
        training: Training | None = None,
        **save_options: Any,
    ) -> Any:
        """Upload the adapters and a model card to a repository on the Hugging Face hub.

        A README that a person wrote or changed in the repository stays. With many processes, all of them must call
        this, and the first one uploads.

        Args:
            repo_id: name of the repository, "owner/name". It is created if it does not exist.
            commit_message: first line of the commit's message.
            commit_description: further text of the commit's message.
            private: whether a new repository is private. None: the owner's default.
            token: token of the hub. None: the one that ``hf auth login`` has stored.
            revision: name of a branch, which is created if it does not exist. None: the main branch.
            create_pr: open a pull request with the files instead of a commit.
            tags: additional tags for the card.
            training: description of the training for the card. None: the card does not describe it.
            save_options: options of `save_pretrained`.

        Returns:
            ``huggingface_hub``'s ``CommitInfo``. None in processes that do not upload.

        Raises:
            ImportError: ``huggingface_hub`` is missing.
            ValueError: ``repo_id`` is not a valid name, or an adapter does not exist.
            huggingface_hub.errors.HfHubHTTPError: the hub refuses the upload.
        """
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / repo_id.rpartition("/")[2]
            self.save_pretrained(folder, **{"training_state": False, **save_options})
            if not writes_files():
                return None
            self.create_or_update_model_card(folder, training, tags)
            from huggingface_hub import HfApi

            hub = HfApi(token=token)
            repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                hub.create_branch(repo_id, branch=revision, exist_ok=True)
            if hub.file_exists(repo_id, CARD_NAME, revision=revision):
                there = hub.hf_hub_download(
                    repo_id, CARD_NAME, revision=revision, local_dir=Path(place) / "there"
                )
                if not is_own(Path(there).read_text(encoding="utf-8")):
                    (folder / CARD_NAME).unlink()
            return hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    def _class_in_transformers(self) -> str | None:
        """The name of the model's own class, if it is a class of Transformers."""
        own = type(self)
        return own.__name__ if own.__module__.startswith("transformers.models.") else None

    def _labels(self) -> int | None:
        """The number of labels of a classifier of Transformers."""
        if not (self._class_in_transformers() or "").endswith("Classification"):
            return None
        return int(getattr(self, "config").num_labels)  # noqa: B009 - mypy does not know `config`
