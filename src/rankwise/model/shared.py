"""Sharing an adapted model's adapters: their card, and the Hugging Face hub."""

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
    """The part of an adapted model that has to do with other people."""

    def create_or_update_model_card(
        self, output_dir: str | os.PathLike[str], training: Training | None = None, tags: Sequence[str] = ()
    ) -> bool:
        """Write ``README.md`` into an adapter's folder, for people and for the hub.

        A README that a person wrote, or changed since, is left as it is. Which license the adapter has is for its
        owner to say.

        Args:
            output_dir: the folder.
            training: how the adapter was trained, if that is known.
            tags: more tags for the hub.

        Returns:
            Whether it was written.

        Raises:
            ImportError: ``huggingface_hub`` is missing.
            ValueError: no adapter acts or trains.
            OSError: it can't be written.

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
        """Upload the adapters, with a card, to a repository on the Hugging Face hub.

        A README that a person wrote or changed there stays. With many processes, all of them call this, and the first
        uploads.

        Args:
            repo_id: "owner/name"; made if there is none.
            commit_message: of the commit.
            commit_description: of the commit.
            private: whether a new repository is; None for the owner's default.
            token: a token of the hub; None for the one that ``hf auth login`` has stored.
            revision: a branch, made if there is none.
            create_pr: open a pull request with the files instead.
            tags: more tags for the card.
            training: what the card tells of the training.
            save_options: of `save_pretrained`.

        Returns:
            ``huggingface_hub``'s ``CommitInfo``; None in processes that do not upload.

        Raises:
            ImportError: ``huggingface_hub`` is missing.
            ValueError: the name is none that the hub takes, or there is no such adapter.
            huggingface_hub.errors.HfHubHTTPError: the hub refuses.
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
        """The name of the model's own class, if Transformers has one of that name."""
        own = type(self)
        return own.__name__ if own.__module__.startswith("transformers.models.") else None

    def _labels(self) -> int | None:
        """How many labels a classifier of Transformers has."""
        if not (self._class_in_transformers() or "").endswith("Classification"):
            return None
        return int(getattr(self, "config").num_labels)  # noqa: B009 - mypy knows no `config`
