"""One fine-tuning job from its configuration to a finished model: the recipe, read from top to bottom.

The eight steps of the tutorial that this program rebuilds, and where each happens:

    1  data               ft/io/hub.py fetches it, ft/data/tables.py `read_split` reads it
    2  model              ft/model/gpt2.py
    3  tokenizer          ft/checkpoint/tokenizer_files.py, by the `tokenizers` library
    4  examples           ft/data/examples.py `encode`
    5  collate function   ft/data/examples.py `collate`
    6  hyper-parameters   ft/config.py
    7  loop               ft/train/loop.py
    8  training           here: everything put together, and what is left behind
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from ft.checkpoint import resume, run_dir, store
from ft.checkpoint import snapshot as snapshots
from ft.checkpoint.async_writer import Saver
from ft.checkpoint.error_hints import nonfinite_advice, training_memory_advice
from ft.checkpoint.host_buffer import HostBuffer
from ft.checkpoint.model_folder import read_description
from ft.checkpoint.snapshot import Snapshot
from ft.config import NEWEST, Config, flag
from ft.data.batches import Batch, collate, collate_padded
from ft.data.examples import Example
from ft.data.load import read_data, with_demo_inputs
from ft.device import (
    Precision,
    choose_precision,
    disable_malloc_trim,
    read_synchronizes,
    threads_for,
    use_device,
)
from ft.distributed.launch import local_rank, process_group, world_size
from ft.distributed.ranks import Ranks
from ft.errors import FtError, printable
from ft.evaluation.classification import write_scores
from ft.evaluation.evaluate import Evaluation, evaluate
from ft.evaluation.perplexity import WINDOWS_AT_ONCE, perplexity, read_general_text
from ft.io.atomic import Executor, atomic_directory
from ft.io.lock import FolderLock
from ft.model import pretrained
from ft.model.compile import compile_blocks, eager_mode
from ft.model.freeze import freeze, num_trainable_parameters
from ft.model.gpt2 import GPT2
from ft.model.pretrained import model_config_of
from ft.report.console import closing, count_parameters, opening, three_completions, three_predictions
from ft.report.model_card import Outcome, model_card
from ft.train.cuda_graphs import require_cuda
from ft.train.loop import train
from ft.train.metrics import Report
from ft.train.optim import build_optimizer
from ft.train.schedule import steps_per_epoch, total_steps
from ft.train.signals import StopRequest
from ft.train.state import State
from ft.train.tensorboard import EventFiles, summary_writer


def fine_tune(config: Config) -> None:
    """Fine-tune as `config` says and leave the result in its output directory; with torchrun in several processes.

    Raises:
        FtError: something the user can mend is wrong; the message says what.
        Stopped: a signal asked to end; the run is saved.
    """
    device = use_device(config.device, local_rank() if world_size() > 1 else None)
    if config.cuda_graphs:
        require_cuda(device)
    precision = choose_precision(config.precision, device)
    if config.tensorboard:
        summary_writer()  # refuses now what it would refuse when the data are read
    with (
        process_group(device, config.process_timeout) as ranks,
        ranks.rank_zero_prints(),
        ExitStack() as stack,
        training_memory_advice(config),
    ):
        ranks.require_same({flag(name): repr(value) for name, value in asdict(config).items() if name != "device"})
        if ranks.has_begun and config.resume is None:
            config = replace(config, resume=NEWEST, overwrite=False)
        config = resume.shared_by(config, ranks.size)
        run = Path(config.output_dir)
        with ranks.rank_zero_first() as first:
            if first:
                lock = stack.enter_context(run_dir.own_folder(config))
        _run_in(run, config, device, precision, ranks, lock if ranks.is_rank_zero else None)


def _run_in(
    run: Path, config: Config, device: torch.device, precision: Precision, ranks: Ranks, lock: FolderLock | None
) -> None:
    started = time.perf_counter()
    with ranks.rank_zero_first() as first:
        resume_from = resume.checkpoint_to_resume(run, config) if first else None
        if config.demo:
            config = with_demo_inputs(config, run / "inputs", write=first)
    step = ranks.all_reduce_max(-1 if resume_from is None else store.step_of(resume_from))
    resume_from = store.checkpoint_path(run, step) if step >= 0 else None
    if resume_from is not None:
        resume.check_config_unchanged(resume_from, config)
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    if not config.release_memory:
        disable_malloc_trim()

    # Data, tokenizer, examples.
    needs_weights = config.init == "pretrained" and resume_from is None
    with ranks.local_rank_zero_first():
        files = pretrained.model_files(config.model, config.model_revision, with_weights=needs_weights)
        described = read_description(files)
        model_config = model_config_of(described.config, config)
        data = read_data(config, described.tokenizer.tokenizer)
        general_text = None
        if config.forgetting is not None:
            general_text = read_general_text(config.forgetting, data.tokenizer, model_config.n_positions)
    train_examples = data.examples["train"]
    digest = data.sha256()
    ranks.require_same({"the SHA-256 of the data": digest})
    last_step = total_steps(len(train_examples), config)
    longer = (
        resume.check_extended_schedule(resume_from, config, len(train_examples)) if resume_from is not None else None
    )

    # Model and optimiser, as published or as a checkpoint left them.
    model = GPT2(model_config)
    freeze(model, config.train_only, config.freeze)
    num_parameters, num_trained = count_parameters(model), num_trainable_parameters(model)
    if resume_from is not None:
        pretrained.load_weights(model, [resume_from / snapshots.WEIGHTS])
    elif needs_weights:
        pretrained.load_weights(model, files.weights)
    else:
        model.init_weights(config.seed)
    model.activation_checkpointing = config.activation_checkpointing
    compile_blocks(model.h, config.compile, device)
    parallel = ranks.parallel(model, device, shard=config.shard, bf16_gradients=config.bf16_gradients)
    # Compiled blocks cast within their kernels, and sharded weights are not here as a whole: both stay on autocast.
    if precision.name != "fp32" and config.compile == "none" and not config.shard:
        model.keep_half_weights(precision.dtype)
    optimizer = build_optimizer(model, config.learning_rate, config.weight_decay)
    scaler = precision.grad_scaler()
    torch.manual_seed(config.seed + ranks.rank)  # as no two processes should drop the same
    state = State()
    if resume_from is not None:
        state = snapshots.load_training_state(resume_from, model, optimizer, scaler, ranks)
        resume.check_data_unchanged(resume_from, state, digest)
        over = state.step >= last_step or state.is_out_of_patience(config.early_stopping_patience)
        if over and not state.evaluation_due and resume.is_finished(run, resume_from):
            why = resume.reason_of_end(state, last_step)
            print(printable(f"This run is finished: {why}, and the model lies in {run / 'final'}."))
            return
        print(
            printable(f"Continuing after step {state.step:,}, from {resume_from}.") + (f" {longer}" if longer else "")
        )
    state.data = digest
    started -= state.seconds
    room = ""
    with ranks.rank_zero_first() as first:
        if first:
            room = run_dir.check_disk_space(run, num_parameters, num_trained, config)
            if resume_from is not None:
                store.supersede_later(run, state.step)
                store.delete_old(run, state, keep=config.keep_checkpoints, keep_best=config.keep_best)
            if config.resume is None:
                run_dir.clear(run)
            config.save(run / "config.json")
            ranks.note_beginning()
    notes = (f"Note: {printable(note)}." for note in (*described.tokenizer.notes, *data.notes))
    print(opening(config, model, precision, data, general_text, last_step), room, *notes, sep="\n")

    # The loop.
    source = described.source(data.label_names)
    with (
        threads_for(num_parameters),
        StopRequest(agree=ranks.all_reduce_max) as stopping,
        Report(
            run / "metrics.jsonl" if ranks.is_rank_zero else None,
            total_steps=last_step,
            first_step=state.step,
            metrics_bytes=state.metrics_bytes,
            tensorboard=EventFiles(run / "tensorboard", first_step=state.step)
            if config.tensorboard and ranks.is_rank_zero
            else None,
            lock=lock,
        ) as report,
        nonfinite_advice(config, run, data.splits["train"]),
    ):
        epochs = 1 / steps_per_epoch(len(train_examples), config)

        def write(snapshot: Snapshot, do: Executor) -> None:
            keep, keep_best = config.keep_checkpoints, config.keep_best
            store.write_checkpoint(run, snapshot, source, keep=keep, keep_best=keep_best, do=do)
            _restore_config(run, config)

        collate_batch = _collate_function(config)
        if device.type == "cpu" and not config.shard:  # whose gradients arrive otherwise
            collate_batch = report.times.observe(model, collate_batch)
        saver = Saver(write, report.line, blocking=config.save_blocking, agree=ranks.all_reduce_max)
        in_pinned_memory = device.type == "cuda" and ranks.is_rank_zero and not config.save_blocking
        host = HostBuffer(device) if in_pinned_memory else None

        evaluations: dict[str, Evaluation] = {}  # the newest of each split

        def evaluate_on(split: str) -> Evaluation | None:
            with eager_mode(config.compile), report.pause("evaluating"):
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
            with eager_mode(config.compile), report.pause("evaluating"):
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
                snapshot = snapshots.take_snapshot(model, optimizer, scaler, state, copy=copy, ranks=ranks, host=host)
                if not ranks.is_rank_zero:
                    return
                try:
                    snapshot.state.metrics_bytes = report.metrics_bytes
                    snapshot.state.seconds = time.perf_counter() - started
                except OSError as error:
                    saver.refused(state.step, error)
                    return
                saver.save(snapshot)

        def put_off(state: State) -> bool:
            # On a GPU many steps are made while a checkpoint is written. On a CPU, where a step takes longer, a save
            # waits instead, so that checkpoints are at the multiples of --save-steps.
            return read_synchronizes(device) and saver.puts_off(state.step)

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
                    put_off=put_off,
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
            told = f"Stopped after step {state.step:,}. To continue: python run.py --resume {printable(str(run))}"
            raise stopping.stopped(told if ranks.is_rank_zero else "")
        seconds = time.perf_counter() - started
        test = evaluations.get("test")
        if test is not None:
            report.evaluation(state.step, state.step * epochs, loss=test.loss, accuracy=test.accuracy, split="test")

    # What is left behind.
    weights = snapshots.gather_weights(model, ranks)
    answers = three_predictions(model, data, config.max_length) if data.label_names else three_completions(model, data)
    if not ranks.is_rank_zero:
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
    with atomic_directory(run / "final") as folder:
        store.save_model(folder, model_config, weights, source)
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
    if not (config.static_shapes or config.cuda_graphs) and config.compile == "none":
        return collate
    return partial(collate_padded, batch_size=config.batch_size, max_length=config.max_length)
