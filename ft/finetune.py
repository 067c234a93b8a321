"""Fine-tune GPT-2: one run from its settings to the final model. Start reading here.

The parts of the tutorial that this program reproduces, and where each is:

    data               ft/data/load.py: files to rows              model               ft/model/gpt2.py
    tokenizer          ft/checkpoint/tokenizer_files.py            hyperparameters     ft/config.py
    examples           ft/data/examples.py `encode`                loop                ft/train/loop.py
    collate function   ft/data/batches.py `collate`                training            `fine_tune`, below
"""

from collections.abc import Callable
from pathlib import Path

from ft.checkpoint import resume
from ft.checkpoint.error_hints import explain_out_of_memory_in_training
from ft.checkpoint.model_builder import build_model
from ft.checkpoint.run_dir import RunDirectory, open_run_directory
from ft.config import Config
from ft.distributed.launch import process_group
from ft.errors import printable
from ft.io.standard_streams import quiet_output, results
from ft.model.freeze import num_trainable_parameters
from ft.report.console import count_parameters, opening
from ft.session import open_session
from ft.setup import Inputs, build_components, precision_of_run, prepare_device, read_inputs, restore_state
from ft.train.loop import train
from ft.train.schedule import total_steps
from ft.train.state import State


def fine_tune(
    config: Config, write_rows: Callable[[Path], None] | None = None, *, exits_on_second_interrupt: bool = True
) -> None:
    """Fine-tune a model and save it to `final/` in the run directory; under torchrun in several processes.

    Args:
        config: the settings of the run.
        write_rows: writes the data set to `config.dataset`, if it is in the run directory: see `ft.fine_tune`.
        exits_on_second_interrupt: whether a second Ctrl-C ends the process; otherwise it raises `KeyboardInterrupt`.

    Raises:
        FtError: something that the user can correct; the message has the reason.
        Stopped: a signal was received; the run is saved.
    """
    # 1. Choose the device and the dtype of matrix products.
    precision = prepare_device(config)
    with (
        process_group(precision.device, config.process_timeout) as ranks,
        ranks.rank_zero_prints(),
        quiet_output(config.quiet),
        explain_out_of_memory_in_training(config),
        # 2. Lock the run directory, and find the checkpoint to resume from, if any.
        open_run_directory(config, ranks, write_rows) as run,
    ):
        config = run.config  # a resumed run keeps its settings, but for those that flags change
        # 3. Read the data set and the tokenizer, and encode the rows as examples.
        inputs = read_inputs(run, ranks)
        examples = inputs.data.examples["train"]
        last_step = total_steps(len(examples), config)
        # 4. Build the model, with pretrained weights or those of the checkpoint. It is still on the CPU.
        model = build_model(config, inputs.files, inputs.model_config, run.resume_from)
        num_parameters, num_trained = count_parameters(model), num_trainable_parameters(model)
        # 5. Move the model to the device, build the optimizer, and restore the training state if the run is resumed.
        precision = precision_of_run(run, precision, num_parameters, ranks)
        components = build_components(model, config, inputs, precision, ranks)
        state = restore_state(run, inputs, model, components)
        if run.resume_from is not None and _is_complete(run, inputs, state):
            return
        disk_space = run.begin(state, num_parameters, num_trained, ranks)
        notes = [f"Note: {printable(note)}." for note in inputs.notes(config)]
        print(
            opening(config, model, precision, inputs.data, inputs.general_text, inputs.class_weights, last_step),
            disk_space,
            *notes,
            sep="\n",
        )
        # 6. Open the metrics file and install signal handlers. The session evaluates, saves and stops.
        with open_session(
            run, inputs, model, components, state, exits_on_second_interrupt=exits_on_second_interrupt
        ) as session:
            # 7. Train. If this raises, the checkpoint that is being written is still completed.
            try:
                if session.prepare(state):
                    train(components, examples, session.collate_function(), config, state, session)
            finally:
                session.close()
            session.finish(state)
        # 8. Save the model, its card and its scores on the test split.
        session.write_results(state)


def _is_complete(run: RunDirectory, inputs: Inputs, state: State) -> bool:
    """Whether the resumed run is finished; prints this, or the step from which it continues.

    Raises:
        UsageError: the settings would make the run shorter.
    """
    assert run.resume_from is not None
    config, num_examples = run.config, len(inputs.data.examples["train"])
    longer = resume.check_extended_schedule(run.resume_from, config, num_examples)
    last_step = total_steps(num_examples, config)
    has_ended = state.step >= last_step or state.is_out_of_patience(config.early_stopping_patience)
    if has_ended and not state.evaluation_due and resume.is_finished(run.path, run.resume_from):
        reason, final = resume.describe_end(state, last_step), run.path / "final"
        with results():
            print(printable(f"This run is finished: {reason}, and the model is saved to {final}."))
        return True
    print(
        printable(f"Continuing after step {state.step:,}, from {run.resume_from}.") + (f" {longer}" if longer else "")
    )
    return False
