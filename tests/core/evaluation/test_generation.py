from __future__ import annotations

import logging

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dora_core.evaluation.generation import generate_texts, option_log_likelihoods

PROMPTS = [
    "Is the sky blue?",
    "A much longer prompt, so that the shorter rows of its batch are padded a lot: open a jar\n\nAnswer: ",
    "x",
    "Please answer with true or false: does ice float on water?\n",
    "The answer is",
    "Two words",
    "Is the sky green, or is it that the sea is?",
]
OPTIONS = [["true", "false"], ["answer1", "answer2", "the last answer3"]] * 3 + [["é", "true"]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges; texts start with <s> and padding is set to the right."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(PROMPTS + ["the answer is answer1 true false"] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", padding_side="right", model_max_length=8
    )


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        attention_dropout=0.5,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).train()
    model.generation_config.eos_token_id = [1, *range(200, 240)]  # so that rows end at different lengths
    return model


def generate(model, tokenizer, prompts=PROMPTS, **changes) -> list[str]:
    return generate_texts(
        model, tokenizer, prompts, **{"batch_size": 3, "num_beams": 1, "max_new_tokens": 12, **changes}
    )


@pytest.mark.parametrize("num_beams", [1, 4])
def test_texts_do_not_depend_on_the_batch_size(model, tokenizer, num_beams: int) -> None:
    alone = generate(model, tokenizer, batch_size=1, num_beams=num_beams)
    assert len(set(alone)) > 3
    for batch_size in (2, 3, 7, 50):
        assert generate(model, tokenizer, batch_size=batch_size, num_beams=num_beams) == alone


def test_greedy_texts_equal_a_loop_of_plain_forward_passes_until_an_end_token(model, tokenizer) -> None:
    expected, lengths = [], []
    model.eval()
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        new: list[int] = []
        while len(new) < 12:
            with torch.no_grad():
                best = model(torch.tensor([ids + new])).logits[0, -1].argmax().item()
            if best in model.generation_config.eos_token_id:
                break
            new.append(best)
        lengths.append(len(new))
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    assert generate(model, tokenizer) == expected
    assert min(lengths) < max(lengths)


def test_sampling_settings_of_the_checkpoint_change_nothing_and_warn_of_nothing(model, tokenizer) -> None:
    expected = generate(model, tokenizer, num_beams=2)
    published = model.generation_config
    sampling = GenerationConfig(
        do_sample=True, temperature=0.1, top_p=0.75, top_k=40, repetition_penalty=3.0, max_length=20
    )
    sampling.eos_token_id = published.eos_token_id
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    model.generation_config = sampling
    try:
        assert generate(model, tokenizer, num_beams=2) == expected
        assert model.generation_config is sampling
    finally:
        model.generation_config = published
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []


def test_texts_are_written_without_attention_that_prepares_itself_for_each_width(model, tokenizer) -> None:
    allowed = []
    hook = model.register_forward_hook(lambda *_: allowed.append(torch.backends.cuda.cudnn_sdp_enabled()))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    generate_texts(model, tokenizer, PROMPTS[:2], batch_size=2, num_beams=1, max_new_tokens=3)
    hook.remove()
    assert before and torch.backends.cuda.cudnn_sdp_enabled() and allowed and not any(allowed)


def test_tokenizer_and_modes_of_the_modules_come_back_as_they_were(model, tokenizer) -> None:
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    generate(model, tokenizer)
    option_log_likelihoods(model, tokenizer, PROMPTS, OPTIONS, batch_size=4)
    assert [module.training for module in model.modules()] == modes
    assert True in modes and False in modes
    assert tokenizer.padding_side == "right"
    assert len(tokenizer("no truncation " * 20)["input_ids"]) > 20


def test_extra_calls_make_up_the_agreed_number_and_change_no_result(model, tokenizer) -> None:
    calls: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[0]))
    try:
        expected = option_log_likelihoods(model, tokenizer, PROMPTS, OPTIONS, batch_size=5)
        num_own = len(calls)
        calls.clear()
        assert (
            option_log_likelihoods(model, tokenizer, PROMPTS, OPTIONS, batch_size=5, num_calls=num_own + 2) == expected
        )
        assert len(calls) == num_own + 2
        calls.clear()
        assert option_log_likelihoods(model, tokenizer, [], [], batch_size=5, num_calls=3) == []
        assert len(calls) == 3
    finally:
        hook.remove()
    assert generate(model, tokenizer, num_calls=5) == generate(model, tokenizer)
    assert generate(model, tokenizer, []) == []
    assert generate(model, tokenizer, [], num_calls=1) == []


def test_fewer_calls_than_batches_are_refused(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="num_calls is 2 but 7 texts in batches of 3 take 3"):
        generate(model, tokenizer, num_calls=2)


def test_option_scores_equal_one_plain_forward_pass_per_option(model, tokenizer) -> None:
    scores = option_log_likelihoods(model, tokenizer, PROMPTS, OPTIONS, batch_size=4)
    model.eval()
    for prompt, options, given in zip(PROMPTS, OPTIONS, scores, strict=True):
        assert len(given) == len(options)
        for option, score in zip(options, given, strict=True):
            encoding = tokenizer(prompt + option, return_offsets_mapping=True)
            ids = encoding["input_ids"]
            with torch.no_grad():
                log_probabilities = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            by_hand = sum(
                log_probabilities[place - 1, ids[place]].item()
                for place, (_, end) in enumerate(encoding["offset_mapping"])
                if end > len(prompt)
            )
            assert score == pytest.approx(by_hand, abs=1e-4)


def test_option_scores_do_not_depend_on_the_batch_size(model, tokenizer) -> None:
    alone = option_log_likelihoods(model, tokenizer, PROMPTS, OPTIONS, batch_size=1)
    for batch_size in (2, 5, 100):
        together = option_log_likelihoods(model, tokenizer, PROMPTS, OPTIONS, batch_size=batch_size)
        for one, other in zip(alone, together, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
            assert one.index(max(one)) == other.index(max(other))


def test_an_option_without_text_and_a_prompt_without_tokens_are_refused(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="at least one of each"):
        option_log_likelihoods(model, tokenizer, ["prompt"], [["true", ""]], batch_size=1)
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), eos_token="a")
    with pytest.raises(ValueError, match="has no tokens"):
        generate(model, bare, [""])
