"""The commands of `dream-lightning`, and its own help. Nothing here loads torch, which takes seconds."""

from dream_lightning.errors import UserError, guess

TRAINER_COMMANDS = {  # methods of the Trainer
    "fit": "Train, or resume with --ckpt_path last.",
    "validate": "Likelihood and scored answers of a checkpoint.",
    "test": "The same, logged as test/….",
    "predict": "Answer questions into a JSON-lines file.",
    "plan": "Report the GPU memory that fit needs.",
}
COMMANDS = {  # name → the module with the function of this name, and the first line of its docstring
    "evaluate": ("evaluation.commands", "Answer benchmarks and write a card: scores, intervals, texts."),
    "compare": ("evaluation.commands", "Compare two folders of `evaluate`: difference, interval, p."),
    "evaluate-grid": ("evaluation.commands", "Accuracy against speed over sampling options."),
    "contamination-report": ("evaluation.contamination", "List benchmark questions that are in training data."),
    "sweep": ("cli", "Train variants of a config: a list, a grid or a search."),
    "report": ("experiments.commands", "Write a page about runs: what differs, curves, scores, cost."),
    "serve": ("serving.commands", "Serve a model as OpenAI's API does, with a page to chat."),
    "chat": ("viewer.commands", "Talk to a model in the terminal."),
    "show-denoising": ("viewer.commands", "Write a page that steps through the denoising of an answer."),
    "data-report": ("viewer.commands", "Lengths of a data set, and what a length limit does to it."),
    "show": ("viewer.commands", "Print one row as the model sees it: what is trained and masked."),
    "export": ("viewer.commands", "Write a checkpoint as a model folder, or its adapters."),
    "push-to-hub": ("hub", "Upload a model, its adapters and a card to the Hugging Face hub."),
    "make-puzzles": ("data.puzzles", "Write Countdown or Sudoku puzzles as JSON lines."),
    "write-trajectories": ("evaluation.trajectories", "Write right answers, and the order in which they were filled."),
    "train-tokenizer": ("tokenizer_training", "Train a byte-level BPE tokenizer on files of text."),
    "configs": ("cli", "List the shipped configs, or copy one: configs copy NAME."),
    "completion": ("cli", "Print a script that completes commands and options in a shell."),
}
SUMMARIES = TRAINER_COMMANDS | {name: summary for name, (_, summary) in COMMANDS.items()}


def program_help() -> str:
    lines = (f"  {name:21}{summary}\n" for name, summary in SUMMARIES.items())
    return f"usage: dream-lightning COMMAND [options]\n\n{''.join(lines)}\ndream-lightning COMMAND --help: its options"


def check_command(name: str) -> None:
    """Raise UserError, with a guess, for a command that does not exist."""
    if name not in SUMMARIES:
        raise UserError(f"there is no command {name}: {guess(name, SUMMARIES)}--help lists them")
