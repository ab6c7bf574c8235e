"""The Optuna study of a sweep: a file that the sweep and its runs share, and the callback that ends hopeless runs."""

from typing import Any

import lightning as L

from dream_lightning.atomic import on_rank_zero
from dream_lightning.errors import UserError

NAME = "sweep"  # of the study in its file


def import_optuna() -> Any:
    """Raises UserError if the extra is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("a search needs Optuna: pip install 'dream_lightning[experiments]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(file: str, *, mode: str = "min", startup_trials: int = 5) -> tuple[Any, Any]:
    """The study in a journal file, made if there is none, and its storage."""
    optuna = import_optuna()
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(file))
    study = optuna.create_study(
        storage=storage,
        study_name=NAME,
        load_if_exists=True,
        direction=f"{mode}imize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=startup_trials),
    )
    return study, storage


class PruneTrial(L.Callback):
    """Report every validation of a run to its study, and end the run if the median of earlier trials is better.

    Args:
        study: the study's file.
        trial: number of the run's trial.
        monitor: the scalar to report.
        mode: `min` if lower is better, else `max`.
        startup_trials: so many trials are never ended.
    """

    def __init__(
        self, study: str, trial: int, monitor: str = "val/nll", mode: str = "min", startup_trials: int = 5
    ) -> None:
        self.study, self.trial, self.monitor = study, trial, monitor
        self.options = {"mode": mode, "startup_trials": startup_trials}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if on_rank_zero(trainer.strategy, lambda: self._is_hopeless(trainer)):
            trainer.should_stop = True

    def _is_hopeless(self, trainer: L.Trainer) -> bool:
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise UserError(f"monitor is {self.monitor}, which is not logged: wanted one of {known}")
        study, storage = open_study(self.study, **self.options)
        study_id = storage.get_study_id_from_name(NAME)
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, self.trial)
        trial = import_optuna().trial.Trial(study, trial_id)
        trial.report(float(trainer.callback_metrics[self.monitor]), trainer.global_step)
        if not trial.should_prune():
            return False
        trial.set_user_attr("pruned", trainer.global_step)
        return True
