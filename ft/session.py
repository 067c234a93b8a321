"""What happens between the steps of a run: log, evaluate, save, stop; and after the last: results and final model."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from ft.checkpoint import store
from ft.checkpoint.async_writer import AsyncWriter
from ft.checkpoint.error_hints import explain_nonfinite
from ft.checkpoint.host_buffer import HostBuffer
from ft.checkpoint.run_dir import RunDirectory
from ft.checkpoint.snapshot import Snapshot, gather_weights, take_snapshot
from ft.data.batches import Batch, collate, collate_padded
from ft.data.examples import Example
from ft.device import read_synchronizes, threads_for
from ft.errors import FtError, program, quoted
from ft.evaluation.classification import majority_baseline, write_scores
from ft.evaluation.evaluate import Evaluation, evaluate
from ft.evaluation.perplexity import WINDOWS_AT_ONCE, perplexity
from ft.io.plain_files import atomic_write_text
from ft.io.standard_streams import results
from ft.model.compile import eager_mode
from ft.model.gpt2 import GPT2
from ft.model.lora import is_lora
from ft.report.console import after_demo, closing, count_parameters, three_completions, three_predictions
from ft.report.model_card import model_card
from ft.report.outcome import Outcome
from ft.report.results import notes_on_exports, performance, write_final_model
from ft.report.run_record import IGNORED_SETTINGS
from ft.setup import Inputs
from ft.train.loop import Components
from ft.train.metrics import MetricsLogger
from ft.train.profiler import trace_steps
from ft.train.schedule import planned_work, steps_per_epoch, total_steps
from ft.train.signals import StopRequest
from ft.train.state import State
from ft.train.tensorboard import EventFiles


@contextmanager
def open_session(
    run: RunDirectory,
    inputs: Inputs,
    model: GPT2,
    components: Components,
    state: State,
    *,
    exits_on_second_interrupt: bool,
) -> Iterator["Session"]:
    """Open the metrics file, install signal handlers and yield a `Session`; undo both at the end.

    Raises:
        FtError: a loss or gradient was not finite; the message names a remedy.
    """
    config, ranks = run.config, components.ranks
    general_windows = 0 if inputs.general_text is None else len(inputs.general_text.windows)
    metrics = tensorboard = None
    if ranks.is_rank_zero:
        metrics = run.path / "metrics.jsonl"
        tensorboard = EventFiles(run.path / "tensorboard", first_step=state.step) if config.tensorboard else None
    with (
        threads_for(count_parameters(model)),
        StopRequest(ranks.all_reduce_max, exits_on_second_interrupt=exits_on_second_interrupt) as stop_requested,
        MetricsLogger(
            metrics,
            total_steps=total_steps(len(inputs.data.examples["train"]), config),
            first_step=state.step,
            metrics_bytes=state.metrics_bytes,
            tensorboard=tensorboard,
            lock=run.lock,
            planned=planned_work(config, inputs.data.examples, general_windows, state.step),
            quiet=config.quiet,
            each_step=not read_synchronizes(components.precision.device),
        ) as report,
        trace_steps(
            Path(config.profile) if config.profile is not None and ranks.is_rank_zero else None,
            state.step,
            total_steps(len(inputs.data.examples["train"]), config),
            report.print_line,
        ) as after_step,
        explain_nonfinite(config, run.path, inputs.data.splits["train"]),
    ):
        yield Session(run, inputs, model, components, state, report, stop_requested, after_step)


class Session:
    """The hooks of the training loop in a run: see `ft.train.loop.Hooks`."""

    def __init__(
        self,
        run: RunDirectory,
        inputs: Inputs,
        model: GPT2,
        components: Components,
        state: State,
        report: MetricsLogger,
        stop_requested: StopRequest,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """`model` is what `components.model` wraps; `stop_requested` returns whether any rank received a signal."""
        self._after_step = after_step
        self._seconds_before = state.seconds  # in earlier processes of a resumed run
        self._run, self._config, self._inputs, self._model = run, run.config, inputs, model
        self._components, self._report, self._stop_requested = components, report, stop_requested
        self._source = replace(
            inputs.description.source(
                inputs.data.label_names, run.config.max_length, inputs.data.splits["train"].label_numbers
            ),
            name=inputs.files.source,
            revision=run.config.model_revision,
        )
        self._steps_per_epoch = steps_per_epoch(len(inputs.data.examples["train"]), run.config)
        self._evaluations: dict[str, Evaluation] = {}  # the last one of each split
        self._last_split = "test" if "test" in inputs.data.examples else "validation"
        splits = inputs.data.splits if inputs.data.label_names else {}
        self._baselines = {
            name: majority_baseline(splits["train"].labels, split.labels) for name, split in splits.items()
        }
        self._seconds_in_all = 0.0
        device, ranks = components.precision.device, components.ranks
        self._writer = AsyncWriter(self._write_checkpoint, report.print_line, blocking=run.config.save_blocking)
        self._newest_save, self._has_reported_deferral = 0, False
        uses_pinned_memory = device.type == "cuda" and ranks.is_rank_zero and not run.config.save_blocking
        self._host = HostBuffer(device) if uses_pinned_memory else None

    # --- the hooks of the loop

    def step_done(self, num_examples: int, num_tokens: int) -> None:
        """Count an optimizer step for throughput and progress."""
        self._report.count_step(examples=num_examples, tokens=num_tokens)
        self._after_step()

    def log(self, step: int, epoch: float, *, loss: float, learning_rate: float, grad_norm: float) -> None:
        """Write the mean training loss to console and metrics.jsonl."""
        self._report.log_training(step, epoch, loss=loss, learning_rate=learning_rate, grad_norm=grad_norm)

    def evaluate(self, state: State) -> None:
        """Evaluate on the validation split and on general text; after a signal the evaluation stays due."""
        result = self._evaluate_split("validation")
        if result is not None and self._measure_forgetting(state):
            self._log_evaluation(state, result, "validation")
            state.record_evaluation(result.loss, result.accuracy, result.macro_f1, self._config.best_metric)

    def defers_save(self, state: State) -> bool:
        """Whether to defer a save because rank 0 is still writing. Only on a GPU, where many steps run meanwhile.

        On a CPU a save waits for the previous one, so that checkpoints stay at multiples of `--save-steps`.
        """
        if not read_synchronizes(self._components.precision.device):
            return False
        is_deferred = bool(self._components.ranks.all_reduce_max(int(self._writer.is_writing)))
        if is_deferred and not self._has_reported_deferral:
            message = f"its checkpoint is deferred: that of step {self._newest_save} is being written"
            self._report.print_line(f"step {state.step:>6}  {message}")
            self._has_reported_deferral = True
        return is_deferred

    def save(self, state: State) -> None:
        """Copy the content of a checkpoint, and write it in a background thread."""
        parts, copy = self._components, not self._config.save_blocking
        with self._report.pause("saving"):
            self._writer.wait()  # so that memory holds one copy at most
            snapshot = take_snapshot(
                self._model, parts.optimizer, parts.scaler, state, copy=copy, ranks=parts.ranks, host=self._host
            )
            if self._config.cuda_graphs and parts.optimizer.waits_for is not None:
                # A captured step cannot wait for the copies before its update: all of the next step waits.
                parts.optimizer.waits_for.wait()
                parts.optimizer.waits_for = None
            if not parts.ranks.is_rank_zero:
                return
            try:
                snapshot.state.metrics_bytes = self._report.metrics_bytes
                snapshot.state.seconds = self._seconds()
            except OSError as error:
                self._writer.report_failure(state.step, error)
                return
            self._newest_save, self._has_reported_deferral = state.step, False
            self._writer.save(snapshot)

    def should_stop(self, state: State) -> bool:
        """Whether to stop, on a signal or by early stopping."""
        return self._stop_requested() or state.is_out_of_patience(self._config.early_stopping_patience)

    # --- before and after the loop

    def prepare(self, state: State) -> bool:
        """Run an evaluation that is due before the first step; returns whether there are steps to train."""
        if state.step == 0:
            self._measure_forgetting(state)
        if state.evaluation_due:  # the run was stopped during the evaluation of this step
            self.evaluate(state)
            if not self._stop_requested():
                self.save(state)
        return not self.should_stop(state)

    def collate_function(self) -> Callable[[Sequence[Example]], Batch]:
        """The collate function: packed batches, or padded ones for static shapes. On a CPU it also times the steps."""
        config = self._config
        function: Callable[[Sequence[Example]], Batch] = collate
        if config.static_shapes or config.cuda_graphs or config.compile != "none":
            function = partial(collate_padded, batch_size=config.batch_size, max_length=config.max_length)
        if self._components.precision.device.type == "cpu" and not config.shard:  # not with the hooks of FSDP2
            return self._report.times.observe(self._model, function)
        return function

    def close(self) -> None:
        """Wait until the last checkpoint is written."""
        self._writer.close()

    def finish(self, state: State) -> None:
        """Evaluate on the test split; without one, on the validation split if that has not been done.

        Raises:
            Stopped: a signal was received; the run is saved.
            FtError: so it was, and the last checkpoint could not be written.
        """
        if self._last_split not in self._evaluations and not self._stop_requested():
            self._evaluate_split(self._last_split)
        ranks, path = self._components.ranks, self._run.path
        if self._stop_requested():
            if self._writer.failure is not None:
                raise FtError(f"stopped, but the last checkpoint could not be written: {self._writer.failure}")
            message = f"Stopped after step {state.step:,}. To continue: {program()} --resume {quoted(path)}"
            raise self._stop_requested.stopped(message if ranks.is_rank_zero else "")
        self._seconds_in_all = self._seconds()
        test = self._evaluations.get("test")
        if test is not None:
            self._log_evaluation(state, test, "test")
        figures = ("loss", "accuracy", "macro_f1") if self._inputs.data.label_names else ("loss", "accuracy")
        metrics = [f"{split}_{figure}" for split in ("eval", "test")[: 1 if test is None else 2] for figure in figures]
        settings = {name: x for name, x in asdict(self._config).items() if name not in IGNORED_SETTINGS}
        self._report.log_hyperparameters(state.step, settings, metrics)

    def write_results(self, state: State) -> None:
        """Write scores.json, the model card and `final/` on rank 0, and print a summary; after `finish`.

        This is outside the context of `open_session`: a signal ends the process at once, and a resumed run repeats it.

        Raises:
            FtError: the last checkpoint could not be written.
        """
        config, data, run, seconds = self._config, self._inputs.data, self._run, self._seconds_in_all
        gathered = gather_weights(self._model, self._components.ranks)
        with eager_mode(config.compile):
            examples = (
                three_predictions(self._model, data, config.max_length)
                if data.label_names
                else three_completions(self._model, data)
            )
        if not self._components.ranks.is_rank_zero:
            return
        run.restore()
        last, test = self._evaluations[self._last_split], self._evaluations.get("test")
        if last.probabilities is not None:
            names, train_labels = data.label_names, data.splits["train"].labels
            split, path = data.splits[self._last_split], run.path / "scores.json"
            write_scores(path, state.step, last.probabilities, last.loss, split, names, train_labels)
        precision = self._components.precision
        speed = performance(self._report.intervals.speed(), self._model, data.examples["train"], precision.device)
        outcome = Outcome(state, test, seconds, self._baselines, speed)
        card = model_card(
            config,
            data,
            outcome,
            num_parameters=sum(weight.numel() for name, weight in gathered.items() if not is_lora(name)),
            device=f"{precision.device} in {precision.name}",
            weights=self._inputs.class_weights,
        )
        write_final_model(run.path, self._model, gathered, self._inputs.model_config, self._source, card)
        atomic_write_text(run.path / "summary.json", json.dumps(outcome.summary(), indent=2) + "\n")
        if (failure := self._writer.failure) is not None:
            raise FtError(
                f"the model is saved to {run.path / 'final'}, but the last checkpoint could not be written "
                f"({failure.strerror or failure}): a longer run could only continue from the one before"
            )
        with results():
            print(closing(run.path, outcome, total_steps(len(data.examples["train"]), config), config, data))
            print(examples)
        print(notes_on_exports(run.path), end="")
        if config.demo:
            print(after_demo(run.path))

    def _seconds(self) -> float:
        """Seconds of the run, including earlier processes."""
        return self._seconds_before + time.perf_counter() - self._run.started

    def _evaluate_split(self, split: str) -> Evaluation | None:
        result = self._evaluate(self._inputs.data.examples[split], self._inputs.data.label_ids)
        if result is not None:
            self._evaluations[split] = result
        return result

    def _log_evaluation(self, state: State, result: Evaluation, split: str) -> None:
        self._report.log_evaluation(
            state.step,
            state.step / self._steps_per_epoch,
            loss=result.loss,
            accuracy=result.accuracy,
            macro_f1=result.macro_f1,
            baseline=self._baselines.get(split),
            rows_sha256=self._inputs.data.splits[split].sha256,
            split="eval" if split == "validation" else split,
        )

    def _measure_forgetting(self, state: State) -> bool:
        """Record the loss on general text with `--forgetting`; returns False if a signal interrupted it."""
        text = self._inputs.general_text
        if text is None:
            return True
        result = self._evaluate(text.windows, [], batch_size=WINDOWS_AT_ONCE, kind="general text")
        if result is None:
            return False
        epoch = state.step / self._steps_per_epoch
        self._report.log_general_text(state.step, epoch, loss=result.loss, perplexity=perplexity(result.loss))
        state.general_loss = result.loss
        if state.step == 0:
            state.general_loss_before = result.loss
        return True

    def _evaluate(
        self,
        examples: Sequence[Example],
        label_ids: Sequence[int],
        batch_size: int | None = None,
        kind: str = "evaluating",
    ) -> Evaluation | None:
        """Evaluate in eager mode; returns None if a signal interrupted it."""
        pause = self._report.pause("evaluating", kind, len(examples))
        with eager_mode(self._config.compile), pause as progress:
            return evaluate(
                self._model,
                examples,
                label_ids,
                batch_size=batch_size or self._config.eval_batch_size,
                precision=self._components.precision,
                stop_requested=self._stop_requested,
                ranks=self._components.ranks,
                progress=progress,
            )

    def _write_checkpoint(self, snapshot: Snapshot) -> None:
        keep, keep_best = self._config.keep_checkpoints, self._config.keep_best
        store.write_checkpoint(self._run.path, snapshot, self._source, keep=keep, keep_best=keep_best)
        self._run.restore_config()
