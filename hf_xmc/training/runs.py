"""The life of a run: how it starts, is saved, goes on and is published."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import HubStrategy, SaveStrategy

from hf_xmc import distributed
from hf_xmc.encoders.forward import forget_autocast, without_autocast
from hf_xmc.hub.self_contained import check_encoder
from hf_xmc.losses.modules import EmbeddingLoss
from hf_xmc.model.model import XMCModel
from hf_xmc.storage.folders import give_default_modes
from hf_xmc.tensors import refuse_non_finite
from hf_xmc.training.arguments import XMCTrainingArguments
from hf_xmc.training.checkpoints import (
    Session,
    as_argument,
    check_resumable,
    check_whole,
    delete_old,
    saved_whole,
    session_of,
    to_resume,
    why_torn,
)
from hf_xmc.training.evaluation_loss import random_state
from hf_xmc.training.refusals import refuse_loss

logger = logging.getLogger(__name__)

LOSS_WEIGHTS = "loss.safetensors"


class FirstState(NamedTuple):
    """The state in which a training began, for another attempt with a smaller batch."""

    weights: dict[str, Tensor]
    negatives: dict[str, Any]
    parts: tuple[Any, Any]  # optimizer and schedule, if there were any
    states: list[Any]  # of those parts
    restore_random_state: Callable[[], None]


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}


class RunTrainer(SentenceTransformerTrainer):
    """The stock trainer, with checkpoints that are whole or not there.

    A subclass makes in :meth:`prepare_for_model` what depends on the model, and writes in :meth:`save_state` what it
    must keep.
    """

    args: XMCTrainingArguments
    loss: nn.Module  # type: ignore[assignment]
    labels: Sequence[str] | Dataset
    loss_given: tuple[Any, dict[str, Tensor]] | None = None  # the loss or what makes it, and its state at that time
    session: Session | None = None  # the training that runs, or ran last
    negatives: Any
    _trial: Any = None
    _first_state: FirstState | None = None
    _staging: str | None = None  # where the stock code writes while a checkpoint is being saved

    def prepare_for_model(self) -> None:
        """Make everything that depends on the model or the arguments, for the first model and for every other."""

    def prepare_loss(self, loss: Any, model: SentenceTransformer) -> nn.Module:
        if self.loss_given is None:  # a module that is given is the loss of every model, in the state that it has now
            learned = own_state(loss) if isinstance(loss, nn.Module) else {}
            self.loss_given = loss, {name: value.detach().clone() for name, value in learned.items()}
        if isinstance(loss, type) and issubclass(loss, EmbeddingLoss):
            loss = loss()  # type: ignore[call-arg]  # these do not take the model, as classes of other losses do
        loss = super().prepare_loss(loss, model)
        refuse_loss(loss)
        return loss

    def save_state(self, folder: Path) -> None:
        """Write what this process needs to go on, in addition to the weights; every process calls it."""

    def load_state(self, folder: Path) -> None:
        """Read what :meth:`save_state` has written."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if learned := own_state(self.loss):
            save_file(learned, Path(output_dir or str(self.args.output_dir)) / LOSS_WEIGHTS)

    def _load_from_checkpoint(self, checkpoint_path: str, *args: Any) -> None:
        super()._load_from_checkpoint(checkpoint_path, *args)
        if learned := own_state(self.loss):
            saved = load_file(Path(checkpoint_path) / LOSS_WEIGHTS)
            for name, value in learned.items():
                value.copy_(saved[name])
        self.load_state(Path(checkpoint_path))

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        refuse_non_finite(self.loss.named_parameters(), f"the weights of step {self.state.global_step}")
        run_dir = Path(self._get_output_dir(trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        session = self.session = self.session or self._next_session(None)
        with saved_whole(folder, self.args.should_save, session) as staged:
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
                logger.warning("%s The run goes on: the next checkpoint is pushed again.", error)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call:  # else it is part of a checkpoint
            folder = Path(output_dir or str(self.args.output_dir))
            give_default_modes(folder, folder.rglob("*.safetensors"))

    def _load_best_model(self) -> None:
        # The stock method logs an error and leaves the last weights in place of the best.
        best = str(self.state.best_model_checkpoint)
        check_whole(best)
        if self.session is not None and session_of(best).run != self.session.run:
            raise ValueError(
                f"{best} was the best checkpoint, but another run has replaced it: give every run an output_dir of "
                "its own. The weights are those of the last step."
            )
        self._load_from_checkpoint(best)

    def _next_session(self, resumed_from: str | None) -> Session:
        run_dir = Path(self._get_output_dir(self._trial))
        return distributed.from_first(lambda: Session.next_in(run_dir, resumed_from))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Called when all that a checkpoint holds is loaded: from here on this is the last run in its folder."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.session = self._next_session(resume_from_checkpoint)
        if self.args.should_save and self.args.save_strategy != SaveStrategy.NO:
            run_dir = Path(self._get_output_dir(self._trial))
            run_dir.mkdir(parents=True, exist_ok=True)
            self.session.write_as_latest(run_dir)
        return prepared

    def _init_training_state(
        self, max_steps: int, updates: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> Any:
        """Find the best checkpoint of a run that is resumed, which may have moved; one of another run will not do."""
        begun = super()._init_training_state(max_steps, updates, epochs, resume_from_checkpoint, trial)
        if resume_from_checkpoint is None:
            return begun
        resumed = Path(resume_from_checkpoint)
        named = TrainerState.load_from_json(str(resumed / TRAINER_STATE_NAME)).best_model_checkpoint
        if named is not None:
            places = [resumed.absolute().parent / Path(named).name, Path(named)]
            run = session_of(resumed).run
            best = next((path for path in places if why_torn(path) is None and session_of(path).run == run), None)
            self.state.best_model_checkpoint = None if best is None else str(best)
            if best is None:
                logger.warning("%s, the best checkpoint of the run, is gone: the best is sought again.", named)
                self.state.best_metric = self.state.best_global_step = None
        return begun

    def _finalize_training(self, trial: Any, *args: Any) -> Any:
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
            logger.warning("No checkpoint of the best step was saved: the weights are those of the last step.")
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # the stock code would delete all others
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
        """Train as the stock trainer. ``True`` (or ``"true"``) resumes the last run from its newest whole checkpoint.

        Raises:
            ValueError: if there is no checkpoint, or the given one is incomplete or holds no optimizer state.
        """
        asked = as_argument(resume_from_checkpoint)
        checkpoint = asked if isinstance(asked, str) else None
        if asked is True:
            checkpoint = distributed.from_first(lambda: str(to_resume(self._get_output_dir(trial))))
        if checkpoint is not None:
            check_whole(checkpoint)
            check_resumable(checkpoint)
        given = dict(vars(self.args))
        try:
            if trial is not None:
                super()._hp_search_setup(trial)  # before the model is made, with the seed of the trial
            return super().train(checkpoint, trial, *args, **kwargs)
        finally:
            self._first_state = None
            forget_autocast(self.model)
            if trial is not None:  # the next one starts from the arguments that were given, and so does `train`
                vars(self.args).update(given)
                self._train_batch_size = self.args.train_batch_size

    def _start_from_the_first_state(self) -> None:
        """Undo what an attempt that ran out of memory has changed, before the next one with a smaller batch."""
        made = [part for part in (self.optimizer, self.lr_scheduler) if part is not None]
        if self._first_state is None:
            self._first_state = FirstState(
                weights={name: value.cpu().clone() for name, value in self.loss.state_dict().items()},
                negatives=_copied(vars(self.negatives)),
                parts=(self.optimizer, self.lr_scheduler),
                states=[copy.deepcopy(part.state_dict()) for part in made],
                restore_random_state=random_state(self.args.device),
            )
            return
        first = self._first_state
        logger.warning("Out of memory: the run starts again with %d queries in a batch.", self._train_batch_size)
        self.loss.load_state_dict(first.weights)
        vars(self.negatives).update(_copied(first.negatives))
        self.optimizer, self.lr_scheduler = first.parts
        for part, state in zip([part for part in first.parts if part is not None], first.states, strict=True):
            part.load_state_dict(copy.deepcopy(state))
        first.restore_random_state()

    def _hp_search_setup(self, trial: Any) -> None:
        """Take the arguments of a trial, and start again with the model that `model_init` has just made."""
        super()._hp_search_setup(trial)
        if self.model_init is not None:
            assert self.loss_given is not None  # the constructor has called `prepare_loss`
            self.loss = self.prepare_loss(self.loss_given[0], self.model)
            self.loss.load_state_dict(self.loss_given[1], strict=False)
            self.prepare_for_model()
            if self.args.push_to_hub:
                distributed.from_first(lambda: check_encoder(self.model))

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make the repository; ``ValueError`` comes first if the encoder could not be published at the end."""
        distributed.from_first(lambda: check_encoder(self.model))  # transformers saves on the first process only
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
        """Publish encoder, labels and index as :meth:`hf_xmc.XMCModel.push_to_hub` does, and nothing else of a run.

        Done when it returns, whatever ``blocking``. Returns the address of the commit; ``None`` on other processes.
        """
        if not self.is_world_process_zero():
            return None
        with without_autocast(self.model):
            return XMCModel(self.model, self.labels).push_to_hub(
                self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name,
                private=self.args.hub_private_repo if private is None else private,
                revision=revision or self.args.hub_revision,
                commit_message=commit_message or "End of training",
                token=token or self.args.hub_token,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing yet: a model is pushed when its checkpoint is whole."""


def own_state(loss: nn.Module) -> dict[str, Tensor]:
    """Return the state that a loss itself has learned, such as a bias, which the encoder's files do not hold."""
    return {name: value for name, value in loss.state_dict().items() if not name.startswith("model.")}
