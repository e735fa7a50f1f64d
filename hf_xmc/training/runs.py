"""The life of a run: how it starts, is saved, goes on and is published."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import HubStrategy, SaveStrategy

from hf_xmc import distributed
from hf_xmc.encoders import roles
from hf_xmc.encoders.forward import forget_autocast, without_autocast
from hf_xmc.hub.self_contained import check_encoder
from hf_xmc.losses.modules import EmbeddingLoss, set_default_temperature
from hf_xmc.model.model import XMCModel
from hf_xmc.storage.folders import give_default_modes
from hf_xmc.tensors import check_finite
from hf_xmc.training.arguments import XMCTrainingArguments
from hf_xmc.training.checkpoints import (
    Session,
    as_argument,
    atomic_checkpoint,
    check_complete,
    check_resumable,
    delete_old,
    session_of,
    to_resume,
    why_incomplete,
)
from hf_xmc.training.checks import check_loss
from hf_xmc.training.negatives import Negatives
from hf_xmc.training.restart import FirstState, own_state

logger = logging.getLogger(__name__)

LOSS_WEIGHTS = "loss.safetensors"


class RunTrainer(SentenceTransformerTrainer):
    """``SentenceTransformerTrainer`` with atomic checkpoints, exact resumption and one commit per push.

    A subclass makes everything that depends on the model in :meth:`prepare_for_model`, and writes further state in
    :meth:`save_state`.

    Each override of a private method has a comment that says what the method does in transformers or
    sentence-transformers, and why no public method or callback can replace the override.
    """

    args: XMCTrainingArguments
    loss: nn.Module  # type: ignore[assignment]
    labels: Sequence[str] | Dataset
    loss_given: tuple[Any, dict[str, Tensor]] | None = None  # the loss or its factory, and its initial state
    session: Session | None = None  # the present training, or the last one
    negatives: Negatives
    _trial: Any = None
    _first_state: FirstState | None = None
    _staging: str | None = None  # folder that transformers writes into while a checkpoint is saved

    def prepare_for_model(self) -> None:
        """Make everything that depends on the model or the arguments; called for each model of ``model_init``."""

    def prepare_loss(self, loss: Any, model: SentenceTransformer) -> nn.Module:
        """Return the loss for a model. The first call keeps the initial state of the loss, for further models."""
        if self.loss_given is None:
            learned = own_state(loss) if isinstance(loss, nn.Module) else {}
            self.loss_given = loss, {name: value.detach().clone() for name, value in learned.items()}
        if isinstance(loss, type) and issubclass(loss, EmbeddingLoss):
            loss = loss()  # losses of sentence-transformers take the model, these do not
        check_loss(loss := super().prepare_loss(loss, model))
        set_default_temperature(loss, cosines=roles.normalises(model))
        return loss

    def save_state(self, folder: Path) -> None:
        """Write the state that a checkpoint needs in addition to the weights. Every process calls it."""

    def load_state(self, folder: Path) -> None:
        """Read the files of :meth:`save_state`."""

    def label_vectors(self) -> Tensor | None:
        """Return a vector for each label ``(L, D)`` that the model adds to its embedding, on every process."""

    # sentence-transformers 6.x loads the encoder's weights alone here, both to resume and for the best model. The loss
    # and the negatives have a state too, and no callback is called at this point.
    def _load_from_checkpoint(self, checkpoint_path: str, *args: Any) -> None:
        super()._load_from_checkpoint(checkpoint_path, *args)
        if learned := own_state(self.loss):
            saved = load_file(Path(checkpoint_path) / LOSS_WEIGHTS)
            for name, value in learned.items():
                value.copy_(saved[name])
        self.load_state(Path(checkpoint_path))

    # transformers 5.x asks for the folder of a run here, also while it saves a checkpoint. The answer is then a staging
    # folder, which is renamed when it is complete.
    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or str(super()._get_output_dir(trial))

    # transformers 5.x writes into the final folder, so a killed process leaves an incomplete checkpoint that looks
    # complete. The callback `on_save` comes afterwards, which is too late.
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        check_finite(self.loss.named_parameters(), f"the weights of step {self.state.global_step}")
        run_dir = Path(self._get_output_dir(trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        session = self.session = self.session or self._next_session(None)
        with atomic_checkpoint(folder, self.args.should_save, session) as staged:
            self._staging = str(staged.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.save_state(staged)
            best = run_dir / f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step and (best == folder or session_of(best).run == session.run):
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        if self.args.should_save:
            delete_old(run_dir, session, self.args.save_total_limit, [self.state.best_model_checkpoint, folder])
        if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END:
            try:
                self.push_to_hub(f"Training in progress, step {self.state.global_step}")
            except RuntimeError as error:
                logger.warning("%s The training continues, and the next checkpoint is pushed again.", error)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the encoder, and the parameters of the loss if it has any."""
        super().save_model(output_dir, _internal_call)
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        if learned := own_state(self.loss):
            save_file(learned, folder / LOSS_WEIGHTS)
        if not _internal_call:  # an internal call is for a checkpoint, which gets its file modes when it is complete
            give_default_modes(folder, folder.rglob("*.safetensors"))

    # sentence-transformers 6.x catches every exception here, logs it, and returns the last weights as the best ones.
    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        check_complete(best)
        if self.session is not None and session_of(best).run != self.session.run:
            raise ValueError(
                f"{best} was the best checkpoint, but another run has replaced it. The model has the weights of the "
                "last step. Give every run its own output_dir."
            )
        self._load_from_checkpoint(best)

    def _next_session(self, resumed_from: str | None) -> Session:
        run_dir = Path(self._get_output_dir(self._trial))
        return distributed.from_first(lambda: Session.next_in(run_dir, resumed_from))

    # transformers 5.x has loaded the whole checkpoint when this returns. Only then may the folder name this run as its
    # last one: a failure to resume must not hide it. `on_train_begin` is not given the checkpoint.
    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.session = self._next_session(resume_from_checkpoint)
        if self.args.should_save and self.args.save_strategy != SaveStrategy.NO:
            run_dir = Path(self._get_output_dir(self._trial))
            run_dir.mkdir(parents=True, exist_ok=True)
            self.session.write_as_latest(run_dir)
        return prepared

    # transformers 5.x drops the best checkpoint with a warning if the folder of the run was moved, and accepts a
    # checkpoint of another run in its place. The state is read here, and no callback comes before its first use.
    def _init_training_state(
        self, max_steps: int, updates: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> Any:
        """Find the best checkpoint of the resumed run, also if its folder was moved."""
        begun = super()._init_training_state(max_steps, updates, epochs, resume_from_checkpoint, trial)
        if resume_from_checkpoint is None:
            return begun
        resumed = Path(resume_from_checkpoint)
        named = TrainerState.load_from_json(str(resumed / TRAINER_STATE_NAME)).best_model_checkpoint
        if named is not None:
            places = [resumed.absolute().parent / Path(named).name, Path(named)]
            run = session_of(resumed).run
            best = next((path for path in places if why_incomplete(path) is None and session_of(path).run == run), None)
            self.state.best_model_checkpoint = None if best is None else str(best)
            if best is None:
                logger.warning(
                    "%s, the best checkpoint of the run, is missing: the search for the best starts again.", named
                )
                self.state.best_metric = self.state.best_global_step = None
        return begun

    # transformers 5.x deletes all checkpoints but the best here if save_total_limit is 1, also those of other runs.
    # Without a limit it deletes nothing. `on_train_end` is called after the deletion.
    def _finalize_training(self, trial: Any, *args: Any) -> Any:
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
            logger.warning("No checkpoint was saved at the best step: the model has the weights of the last step.")
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(trial, *args)
        finally:
            self.args.save_total_limit = limit
        best = self.state.best_model_checkpoint
        if self.args.should_save and limit == 1 and best is not None and self.session is not None:
            delete_old(Path(self._get_output_dir(trial)), self.session, limit, [best])
        return output

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Train as ``SentenceTransformerTrainer`` does.

        Args:
            resume_from_checkpoint: Path of a checkpoint. ``True`` (or ``"true"``) resumes the last run in the output
                folder from its latest complete checkpoint.
            trial: Trial of a hyperparameter search.

        Raises:
            ValueError: if there is no checkpoint, or if it is incomplete or holds no optimizer state.
        """
        asked = as_argument(resume_from_checkpoint)
        checkpoint = asked if isinstance(asked, str) else None
        if asked is True:
            checkpoint = distributed.from_first(lambda: str(to_resume(self._get_output_dir(trial))))
        if checkpoint is not None:
            check_complete(checkpoint)
            check_resumable(checkpoint)
        given = dict(vars(self.args))
        try:
            if trial is not None:
                super()._hp_search_setup(trial)  # transformers 5.x makes the model before it sets the trial's seed
            return super().train(checkpoint, trial, *args, **kwargs)
        finally:
            self._first_state = None
            forget_autocast(self.model)
            if trial is not None:  # the next trial, and `train`, start from the given arguments
                vars(self.args).update(given)
                self._train_batch_size = self.args.train_batch_size

    def _start_again_from_first_state(self) -> None:
        """Undo the changes of an attempt that ran out of memory. Called before each attempt."""
        if self._first_state is None:
            self._first_state = FirstState.of(self)
            return
        logger.warning("Out of memory: the training starts again with %d queries per batch.", self._train_batch_size)
        self._first_state.restore(self)

    # transformers 5.x calls this right after `model_init` has made a model, with or without a trial. The loss and the
    # labels must be prepared for the new model here, and there is no callback.
    def _hp_search_setup(self, trial: Any) -> None:
        """Set the arguments of a trial, and prepare for the new model of `model_init`."""
        super()._hp_search_setup(trial)
        if self.model_init is not None:
            assert self.loss_given is not None  # the constructor has called `prepare_loss`
            self.loss = self.prepare_loss(self.loss_given[0], self.model)
            self.loss.load_state_dict(self.loss_given[1], strict=False)
            self.prepare_for_model()
            if self.args.push_to_hub:
                distributed.from_first(lambda: check_encoder(self.model))

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository; raise ``ValueError`` first if the encoder could not be published at the end."""
        distributed.from_first(lambda: check_encoder(self.model))  # only the first process saves
        super().init_hf_repo(*args, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Publish the encoder, labels and index as :meth:`hf_xmc.XMCModel.push_to_hub` does, and no file of the run.

        The upload is complete on return, even if ``blocking`` is false. Return the URL of the commit, and ``None`` on
        all processes but the first.
        """
        vectors = self.label_vectors()  # of all processes
        if not self.is_world_process_zero():
            return None
        with without_autocast(self.model):
            return XMCModel(self.model, self.labels, label_vectors=vectors).push_to_hub(
                self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name,
                private=self.args.hub_private_repo if private is None else private,
                revision=revision or self.args.hub_revision,
                commit_message=commit_message or "End of training",
                token=token or self.args.hub_token,
            )

    # transformers 5.x pushes files of the staging folder here, pickled arguments included, before the checkpoint is
    # complete. `_save_checkpoint` pushes the model afterwards.
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing."""
