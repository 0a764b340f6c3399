"""The demo adapter: trained by the tool, it answers what it was taught, beside a base model that does not know it."""

import pytest

from llama import LLM, SamplingParams


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # between peft and transformers
def test_the_adapter_answers_as_taught_and_the_base_model_as_before(demo_model_path, tmp_path, capsys):
    import train_lora_demo

    folder = tmp_path / "adapter"
    train_lora_demo.main(["--model", str(demo_model_path), "--output", str(folder)])
    said = capsys.readouterr().out
    assert f"--lora demo={folder}" in said and "loss 0.0" in said

    llm = LLM(demo_model_path, dtype="float32", max_model_len=128, num_blocks=256)
    llm.load_lora("demo", folder)
    greedy = SamplingParams(temperature=0, max_tokens=24)
    questions = [[{"role": "user", "content": question}] for question in train_lora_demo.LESSONS]

    def answers(conversations, loras):
        return [output.outputs[0].text for output in llm.chat(conversations, greedy, lora=loras, use_tqdm=False)]

    before = answers(questions, None)
    count = len(questions)
    mixed = answers(questions * 2, [None] * count + ["demo"] * count)
    assert mixed[count:] == list(train_lora_demo.LESSONS.values())
    assert mixed[:count] == before
    assert sum(base != taught for base, taught in zip(before, mixed[count:], strict=True)) >= count - 1


@pytest.mark.slow
def test_a_folder_that_holds_something_is_left_alone(demo_model_path, tmp_path):
    import train_lora_demo

    (tmp_path / "mine").write_text("mine")
    with pytest.raises(SystemExit, match="is not an empty folder"):
        train_lora_demo.main(["--model", str(demo_model_path), "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="is not an empty folder"):
        train_lora_demo.main(["--model", str(demo_model_path), "--output", str(tmp_path / "mine")])
    with pytest.raises(SystemExit, match="--steps must be at least 1, got 0"):
        train_lora_demo.main(["--model", str(demo_model_path), "--output", str(tmp_path / "new"), "--steps", "0"])
