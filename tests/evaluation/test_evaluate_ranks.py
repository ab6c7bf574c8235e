"""`evaluate` on two processes."""

from material import save_tiny_folder, write_jsonl
from meeting import MeetingPoint, Program

from dream_lightning.evaluation.evaluate import evaluate
from dream_lightning.sampling import SamplingParams
from dream_lightning.viewer.commands import open_model

ROWS = [{"question": f"{n}+1=?", "answer": str(n + 1)} for n in range(9)]


def on_rank(folder, source, out, devices):
    model, tokenizer = open_model(folder)
    params = SamplingParams(max_new_tokens=4, steps=4, forbid_mask=True, alg="origin", temperature=0.7)
    evaluate(model, tokenizer, [source], name="tiny", out=out, sampling=params, batch_size=2, devices=devices)


def test_two_processes_write_the_card_of_one(tmp_path):
    folder, source = save_tiny_folder(tmp_path / "model"), str(write_jsonl(tmp_path / "sums.jsonl", ROWS))
    point = MeetingPoint()  # holds the port
    meeting = point.environment | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    meeting |= {"TORCHELASTIC_RUN_ID": "test"}
    two = [
        Program(on_rank, folder, source, str(tmp_path / "two"), 2, LOCAL_RANK=rank, RANK=rank, **meeting)
        for rank in "01"
    ]
    on_rank(folder, source, str(tmp_path / "one"), 1)
    for rank in two:
        rank.end()
    for name in ("items.jsonl", "card.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert len((tmp_path / "two" / "items.jsonl").read_text().splitlines()) == 9
