"""Prompts and responses as tokens: where a response begins, and with what it ends."""

import pytest

from dpo_jax import lm
from tests.lm import tiny

CHAT = [{"role": "user", "content": "ab?"}]


def shown(ids):
    return tiny.text().decode(ids)


def test_a_chat_is_written_by_the_template_and_ends_with_one_end_token():
    prompt, response = tiny.text().encode(CHAT, "yes")
    assert shown(prompt) == "<|im_start|>user\nab?<|im_end|>\n<|im_start|>assistant\n"
    assert shown(response) == "yes<|im_end|>"  # without the newline that the template adds
    assert prompt == tiny.text().prompt(CHAT)


def test_text_without_a_chat_gets_the_end_token_once():
    assert shown(tiny.text().encode("Q:", " yes")[1]) == " yes<|im_end|>"
    assert shown(tiny.text().encode("Q:", " yes<|im_end|>")[1]) == " yes<|im_end|>"


@pytest.mark.parametrize("response", ["", " ", "\n\n", "naïve 🙂", "a" * 300, "  spaces  ", "日本語\n"])
def test_responses_come_back_as_they_were(response):
    for prompt in (CHAT, "Q:\n"):
        ids = tiny.text().encode(prompt, response)[1]
        assert shown(ids) == response + "<|im_end|>"


def test_a_template_without_an_end_gets_the_end_token():
    plain = (
        "{% for message in messages %}[{{ message['content'] }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}"
    )
    prompt, response = tiny.text(plain).encode(CHAT, "yes")
    assert (shown(prompt), shown(response)) == ("[ab?][", "yes]<|im_end|>")


def test_a_boundary_that_merges_is_refused_with_a_remedy():
    with pytest.raises(
        ValueError, match="end of the prompt, 'a', becomes 'ab' when a response follows: end the prompt"
    ):
        tiny.text().encode("xa", "bc")
    with pytest.raises(ValueError, match="end of the prompt, ' ', becomes ' a' .* without white space"):
        tiny.text().encode("Assistant: ", "a")
    alone = "{% if add_generation_prompt %}?{% else %}!{% endif %}"
    greedy = "{{ messages[0]['content'] }}" + alone + "{{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="the chat template must write a prompt alone as it writes it before"):
        tiny.text(greedy).encode(CHAT, "yes")


def test_stops_are_the_end_token_and_what_the_template_writes_last():
    other = tiny.TEMPLATE.replace("<|im_end|>", "<|im_start|>")
    ids = tiny.text().tokenizer.token_to_id
    assert tiny.text().stops == {ids("<|im_end|>")}
    assert tiny.text(other).stops == {ids("<|im_end|>"), ids("<|im_start|>")}


def test_there_are_as_many_ids_as_the_largest_says():
    assert tiny.text().size == 256 + 2 + 2
    assert tiny.text().end == 259


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "there is no chat template: give prompts and responses as text, or add chat_template.jinja"),
        ("{% for %}", "the chat template cannot be read"),
        ("{{ raise_exception('only two roles') }}", "refuses these messages: only two roles"),
        ("{{ messages[0]['content'].__class__.__mro__ }}", "refuses these messages: access to attribute"),
        ("{{ messages.append(1) }}", "refuses these messages: .*append"),
        ("{{ cycler.__init__.__globals__ }}", "refuses these messages"),
        ("{% for i in range(10**9) %}x{% endfor %}", "refuses these messages: Range too big"),
    ],
)
def test_bad_templates_are_refused_and_nothing_is_executed(template, message):
    with pytest.raises(ValueError, match=message):
        tiny.text(template).prompt(CHAT)


@pytest.mark.parametrize(
    "message",
    ["text", {"role": "user"}, {"content": "a"}, {"role": 1, "content": "a"}, {"role": "user", "content": ["a"]}],
)
def test_messages_need_a_role_and_text(as_users_have_it, message):
    with pytest.raises(ValueError, match="must have a role and a content"):
        tiny.text().prompt([message])


def save(folder, **options):
    import json

    tiny.text().tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", **options}))
    return folder


def test_it_is_read_from_a_folder(tmp_path):
    (save(tmp_path) / "chat_template.jinja").write_text(tiny.TEMPLATE)
    assert lm.Text.load(tmp_path).encode(CHAT, "yes") == tiny.text().encode(CHAT, "yes")


@pytest.mark.parametrize(
    "options",
    [
        {"chat_template": tiny.TEMPLATE},
        {"chat_template": [{"name": "tools", "template": ""}, {"name": "default", "template": tiny.TEMPLATE}]},
        {"chat_template": tiny.TEMPLATE, "eos_token": {"content": "<|im_end|>", "lstrip": False}},
    ],
    ids=["a string", "a list", "an object as token"],
)
def test_older_forms_are_read(tmp_path, options):
    assert lm.Text.load(save(tmp_path, **options)).encode(CHAT, "yes") == tiny.text().encode(CHAT, "yes")


def test_damaged_files_are_refused_by_name(tmp_path):
    save(tmp_path, eos_token="<|end|>")
    with pytest.raises(ValueError, match="tokenizer_config.json: the eos_token '<|end|>' is not among the tokens"):
        lm.Text.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match="tokenizer_config.json: not JSON"):
        lm.Text.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: "):
        lm.Text.load(tmp_path)
    with pytest.raises(OSError, match="tokenizer.json"):
        lm.Text.load(tmp_path / "nowhere")
