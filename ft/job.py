"""One fine-tuning job from its configuration to a finished model: the recipe, read from top to bottom.

The eight steps of the tutorial that this program rebuilds, and where each happens:

    1  data               ft/hub.py fetches it, ft/tables.py `read_split` reads it
    2  model              ft/gpt2.py
    3  tokenizer          the `tokenizers` library, from the model's tokenizer.json
    4  examples           ft/data.py `encode`
    5  collate function   ft/data.py `collate`
    6  hyper-parameters   ft/config.py
    7  loop               ft/train.py
    8  training           here: everything put together, and what is left behind
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from ft import checkpoint, hub, runs
from ft.advice import memory_advice, nonfinite_advice
from ft.checkpoint import ModelSource, Snapshot
from ft.config import NEWEST, Config, flag
from ft.data import Batch, Example, collate, collate_padded, read_tokenizer
from ft.distributed import Ranks
from ft.errors import FtError
from ft.evaluate import Evaluation, evaluate
from ft.files import Do, FolderLock, complete_or_absent, read_json
from ft.forgetting import WINDOWS_AT_ONCE, perplexity, read_general_text
from ft.freeze import freeze, number_of_trained
from ft.gpt2 import GPT2
from ft.inputs import model_config_of, read_data, with_demo_inputs
from ft.machine import Precision, choose_device, choose_precision, compile_blocks, keep_freed_memory, uncompiled
from ft.model_card import Outcome, model_card
from ft.optim import build_optimizer
from ft.report import Report
from ft.saver import Saver
from ft.scores import write_scores
from ft.state import State
from ft.stop import StopRequest
from ft.summary import closing, number_of_parameters, opening, three_completions, three_predictions
from ft.tensorboard import EventFiles, summary_writer
from ft.torchrun import joined, local_rank, number_of_processes
from ft.train import steps_per_epoch, total_steps, train


def run_job(config: Config) -> None:
    """Fine-tune as `config` says and leave the result in its output directory; with torchrun in several processes.

    Raises:
        FtError: something the user can mend is wrong; the message says what.
        Stopped: a signal asked to end; the run is saved.
    """
    device = choose_device(config.device, local_rank() if number_of_processes() > 1 else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    precision = choose_precision(config.precision, device)
    if config.tensorboard:
        summary_writer()  # refuses now what it would refuse when the data are read
    with (
        joined(device, config.process_timeout) as ranks,
        ranks.speaking(),
        ExitStack() as stack,
        memory_advice(config),
    ):
        ranks.require_same({flag(name): repr(value) for name, value in asdict(config).items() if name != "device"})
        if ranks.has_begun and config.resume is None:
            config = replace(config, resume=NEWEST, overwrite=False)
        config = runs.shared_by(config, ranks.size)
        run = Path(config.output_dir)
        with ranks.first_alone() as first:
            if first:
                lock = stack.enter_context(runs.own_folder(config))
        _run_in(run, config, device, precision, ranks, lock if ranks.is_first else None)


def _run_in(
    run: Path, config: Config, device: torch.device, precision: Precision, ranks: Ranks, lock: FolderLock | None
) -> None:
    started = time.perf_counter()
    with ranks.first_alone() as first:
        resume_from = runs.checkpoint_to_resume(run, config) if first else None
        if config.demo:
            config = with_demo_inputs(config, run / "inputs", write=first)
    step = ranks.highest(-1 if resume_from is None else checkpoint.step_of(resume_from))
    resume_from = checkpoint.folder_of(run, step) if step >= 0 else None
    if resume_from is not None:
        runs.refuse_another_run(resume_from, config)
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    if not config.release_memory:
        keep_freed_memory()

    # Data, tokenizer, examples.
    needs_weights = config.init == "pretrained" and resume_from is None
    with ranks.one_per_machine_first():
        files = hub.model_files(config.model, config.model_revision, with_weights=needs_weights)
        published = read_json(files.config)
        model_config = model_config_of(published, files.config, config)
        data = read_data(config, read_tokenizer(files.tokenizer), model_config)
        general_text = None
        if config.forgetting is not None:
            general_text = read_general_text(config.forgetting, data.tokenizer, model_config.n_positions)
    train_examples = data.examples["train"]
    digest = data.sha256()
    ranks.require_same({"the SHA-256 of the data": digest})
    last_step = total_steps(len(train_examples), config)
    longer = runs.lengthened(resume_from, config, len(train_examples)) if resume_from is not None else None

    # Model and optimiser, as published or as a checkpoint left them.
    model = GPT2(model_config)
    freeze(model, config.train_only, config.freeze)
    num_parameters, num_trained = number_of_parameters(model), number_of_trained(model)
    if resume_from is not None:
        checkpoint.load_weights(model, [resume_from / checkpoint.WEIGHTS])
    elif needs_weights:
        checkpoint.load_weights(model, files.weights)
    else:
        model.init_weights(config.seed)
    model.activation_checkpointing = config.activation_checkpointing
    compile_blocks(model.h, config.compile, device)
    parallel = ranks.parallel(model, device, shard=config.shard, bf16_gradients=config.bf16_gradients)
    optimizer = build_optimizer(model, config.learning_rate, config.weight_decay)
    scaler = precision.grad_scaler()
    torch.manual_seed(config.seed + ranks.rank)  # as no two processes should drop the same
    state = State()
    if resume_from is not None:
        state = checkpoint.load_training_state(resume_from, model, optimizer, scaler, ranks)
        runs.refuse_other_data(resume_from, state, digest)
        over = state.step >= last_step or state.is_out_of_patience(config.early_stopping_patience)
        if over and not state.evaluation_due and runs.is_finished(run, resume_from):
            why = runs.reason_of_end(state, last_step)
            print(f"This run is finished: {why}, and the model lies in {run / 'final'}.")
            return
        print(f"Continuing after step {state.step:,}, from {resume_from}." + (f" {longer}" if longer else ""))
    state.data = digest
    started -= state.seconds
    room = ""
    with ranks.first_alone() as first:
        if first:
            room = runs.room_for(run, num_parameters, num_trained, config)
            if resume_from is not None:
                checkpoint.supersede_later(run, state.step)
                checkpoint.delete_old(run, state, keep=config.keep_checkpoints, keep_best=config.keep_best)
            if config.resume is None:
                runs.clear(run)
            config.save(run / "config.json")
            ranks.note_beginning()
    notes = (f"Note: {note}." for note in data.notes)
    print(opening(config, model, precision, data, general_text, last_step), room, *notes, sep="\n")

    # The loop.
    source = ModelSource(published, files.tokenizer.read_bytes(), data.label_names)
    with (
        StopRequest(agree=ranks.highest) as stopping,
        Report(
            run / "metrics.jsonl" if ranks.is_first else None,
            total_steps=last_step,
            first_step=state.step,
            metrics_bytes=state.metrics_bytes,
            tensorboard=EventFiles(run / "tensorboard", first_step=state.step)
            if config.tensorboard and ranks.is_first
            else None,
            lock=lock,
        ) as report,
        nonfinite_advice(config, run, data.splits["train"]),
    ):
        epochs = 1 / steps_per_epoch(len(train_examples), config)

        def write(snapshot: Snapshot, do: Do) -> None:
            keep, keep_best = config.keep_checkpoints, config.keep_best
            checkpoint.write_checkpoint(run, snapshot, source, keep=keep, keep_best=keep_best, do=do)
            _restore_config(run, config)

        collate_batch = _collate_function(config)
        if device.type == "cpu" and not config.shard:  # whose gradients arrive otherwise
            collate_batch = report.times.observe(model, collate_batch)
        saver = Saver(write, report.line, blocking=config.save_blocking)

        evaluations: dict[str, Evaluation] = {}  # the newest of each split

        def evaluate_on(split: str) -> Evaluation | None:
            with uncompiled(config.compile), report.pause("evaluating"):
                result = evaluate(
                    model,
                    data.examples[split],
                    data.label_ids,
                    batch_size=config.eval_batch_size,
                    precision=precision,
                    stopping=stopping,
                    ranks=ranks,
                )
            if result is not None:
                evaluations[split] = result
            return result

        def measure_forgetting(state: State) -> bool:
            """Note the loss on general text, where that is wanted; False if the run is to end first."""
            if general_text is None:
                return True
            windows = general_text.windows
            with uncompiled(config.compile), report.pause("evaluating"):
                result = evaluate(
                    model, windows, [], batch_size=WINDOWS_AT_ONCE, precision=precision, stopping=stopping, ranks=ranks
                )
            if result is None:
                return False
            loss = result.loss
            report.general_text(state.step, state.step * epochs, loss=loss, perplexity=perplexity(loss))
            state.general_loss = loss
            if state.step == 0:
                state.general_loss_before = loss
            return True

        def validate(state: State) -> None:
            result = evaluate_on("validation")
            if result is not None and measure_forgetting(state):
                report.evaluation(state.step, state.step * epochs, loss=result.loss, accuracy=result.accuracy)
                state.note(result.loss, result.accuracy)

        def save(state: State) -> None:
            with report.pause("saving"):
                saver.wait()  # before another copy of everything is made
                copy = not config.save_blocking
                snapshot = checkpoint.take_snapshot(model, optimizer, scaler, state, copy=copy, ranks=ranks)
                if not ranks.is_first:
                    return
                try:
                    snapshot.state.metrics_bytes = report.metrics_bytes
                    snapshot.state.seconds = time.perf_counter() - started
                except OSError as error:
                    saver.refused(state.step, error)
                    return
                saver.save(snapshot)

        def ends_here() -> bool:
            return stopping() or state.is_out_of_patience(config.early_stopping_patience)

        try:
            if state.step == 0:
                measure_forgetting(state)
            if state.evaluation_due:  # the run was stopped in the evaluation that belongs to this step
                validate(state)
                if not stopping():
                    save(state)
            if not ends_here():
                train(
                    parallel,
                    optimizer,
                    scaler,
                    train_examples,
                    config,
                    state,
                    precision=precision,
                    collate=collate_batch,
                    report=report,
                    evaluate=validate,
                    save=save,
                    stopping=ends_here,
                    ranks=ranks,
                )
        finally:
            saver.wait()
        judged = "test" if "test" in data.examples else "validation"
        if judged not in evaluations and not stopping():
            evaluate_on(judged)
        if stopping():
            if saver.failure is not None:
                raise FtError(f"stopped, but the last checkpoint could not be written: {saver.failure}")
            told = f"Stopped after step {state.step:,}. To continue: python run.py --resume {run}"
            raise stopping.stopped(told if ranks.is_first else "")
        seconds = time.perf_counter() - started
        test = evaluations.get("test")
        if test is not None:
            report.evaluation(state.step, state.step * epochs, loss=test.loss, accuracy=test.accuracy, split="test")

    # What is left behind.
    weights = checkpoint.weights_of(model, ranks)
    answers = three_predictions(model, data, config.max_length) if data.label_names else three_completions(model, data)
    if not ranks.is_first:
        return
    if lock is not None:
        lock.restore()
        _restore_config(run, config)
    probabilities = evaluations[judged].probabilities
    if probabilities is not None:
        write_scores(run / "scores.json", state.step, probabilities, data.splits[judged], data.label_names)
    card = model_card(
        config,
        data,
        Outcome(state, test, seconds),
        num_parameters=num_parameters,
        device=f"{device} in {precision.name}",
    )
    with complete_or_absent(run / "final") as folder:
        checkpoint.save_model(folder, model_config, weights, source)
        folder.write("README.md", [card.encode()])
    if saver.failure is not None:
        raise FtError(
            f"the model lies in {run / 'final'}, but the last checkpoint could not be written "
            f"({saver.failure.strerror or saver.failure}): a longer run could only continue from the one before"
        )
    print(closing(run, state, last_step, seconds, config, test))
    print(answers)
    if config.demo:
        print("\nNow the real thing: python run.py --device cuda (or mps, or cpu)")


def _restore_config(run: Path, config: Config) -> None:
    """Write the settings again if the folder was moved or deleted meanwhile, and has been made anew."""
    if not (run / "config.json").exists():
        config.save(run / "config.json")


def _collate_function(config: Config) -> Callable[[Sequence[Example]], Batch]:
    """Packed batches, or padded ones where shapes must not change."""
    if not config.static_shapes and config.compile == "none":
        return collate
    return partial(collate_padded, batch_size=config.batch_size, max_length=config.max_length)
