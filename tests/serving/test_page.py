"""The page at ``/`` in a real Chromium, in front of a real server."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from mini_infer import AsyncLLMEngine
from mini_infer.config import BUNDLED_MODEL
from mini_infer.serving.app import PAGE
from tests.engine.checkpoints import save_tokenizer
from tests.models.llada import make_llada_checkpoint

from .browser import Page, chromium
from .running import Running, running

TAB, ESCAPE, END, HOME, LEFT, DOWN = "\ue004\ue00c\ue010\ue011\ue012\ue015"  # as WebDriver spells these keys

ANSWERED = "$('.answer[aria-busy=false]')"
IDLE = "$('#picture').dataset.used === '0' && $('#engine').dataset.running === '0'"
CHINESE = re.compile("[\u4e00-\u9fff]")

# Every element with words of its own that somebody sees or hears, and what it says; not what people, models or
# numbers say, nor what is hidden.
WORDS = """
$$("body *").filter((e) => !e.closest("[translate=no], #model") && e.checkVisibility()).flatMap((e) => [
    ...[...e.childNodes].filter((n) => n.nodeType === Node.TEXT_NODE).map((n) => n.data),
    ...["aria-label", "aria-valuetext", "placeholder"].map((name) => e.getAttribute(name) ?? ""),
].filter((text) => /\\p{L}/u.test(text)).map((text) => text.trim()))
"""

# The contrast of every visible text with what is behind it, by WCAG's formula: [ratio, text].
CONTRASTS = """
(() => {
    const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (colour) => {
        const [r, g, b] = parse(colour).map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (e) => {
        for (; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            if (parse(colour)[3] !== 0) return colour;
        }
    };
    return $$("body *").filter((e) => e.checkVisibility() && e.tagName !== "OPTION")
        .filter((e) => e.placeholder || [...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.data.trim()))
        .map((e) => {
            const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
            return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent || e.placeholder];
        });
})()
"""

# From now on keep the bodies that are sent.
REMEMBER_BODIES = """
    window.sent = [];
    const original = window.fetch;
    window.fetch = (path, options) => {
        if (options?.body) sent.push(JSON.parse(options.body));
        return original(path, options);
    };
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Page]:
    """The page in front of the server that all tests share; it must not complain, nor leave anything running."""
    page = Page(browser, server.url)
    page.wait_until_live()
    yield page
    assert page.console() == []
    browser.get("about:blank")
    page.wait(server.is_idle)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose model never ends an answer by itself. Two sequences run at once, and one more may wait."""
    model = tmp_path_factory.mktemp("endless")
    for file in Path(BUNDLED_MODEL).iterdir():
        shutil.copy(file, model)
    for name in ("config.json", "generation_config.json"):
        told = json.loads((model / name).read_text())
        longer = {"max_position_embeddings": 65_536} if "max_position_embeddings" in told else {}
        (model / name).write_text(json.dumps(told | longer | {"eos_token_id": -1}))  # which no token has
    told = json.loads((model / "tokenizer_config.json").read_text())
    del told["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(told))
    engine = AsyncLLMEngine(
        model=model, dtype="float32", num_gpu_blocks=20_000, max_num_seqs=2, max_waiting=1, enforce_eager=True
    )  # not replayed: an answer should last longer than it takes to press a button
    with running(engine, served_model_name="endless") as server:
        yield server


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose model fills in a canvas."""
    model = make_llada_checkpoint(tmp_path_factory.mktemp("llada"), 3)
    save_tokenizer(model)
    with running(AsyncLLMEngine(model=model, device="cpu"), served_model_name="canvas") as server:
        yield server


@pytest.fixture
def endless_page(browser: Any, endless: Running) -> Iterator[Page]:
    page = Page(browser, endless.url)
    page.wait_until_live()
    yield page
    browser.get("about:blank")
    page.wait(endless.is_idle)


class TestChat:
    def test_an_answer_streams(self, page: Page) -> None:
        page.driver.execute_script("""
            window.lengths = new Set();
            new MutationObserver(() => lengths.add(document.querySelector(".answer .text")?.textContent.length))
                .observe(document.querySelector("#log"), { childList: true, subtree: true });
        """)
        page.ask("What is a KV cache?")
        page.wait(ANSWERED)
        assert page.js("$('.question .text').textContent") == "What is a KV cache?"
        assert "keys and values" in page.js("$('.answer .text').textContent")
        assert page.js("lengths.size") > 5, "the text did not come piece by piece"
        facts = page.js("$$('.answer .facts span').map((e) => e.textContent)")
        patterns = (r"\d+ tokens", r"[\d.,]+ tokens/s", r"first token after [\d,]+ ms", r"prompt of \d+ tokens")
        assert len(facts) == 4 and all(map(re.fullmatch, patterns, facts)), facts

    def test_the_conversation_goes_on_and_begins_anew(self, page: Page) -> None:
        def prompt_tokens() -> int:
            shown = page.js("$$('.answer .facts span').findLast((e) => e.dataset.i18n === 'answer_prompt').textContent")
            return int(re.findall(r"\d+", shown)[0])

        lengths = []
        for number, question in enumerate(("What is TTFT?", "What is 7 + 8?"), 1):
            page.ask(question)
            page.wait(f"$$('.answer[aria-busy=false]').length === {number}")
            lengths.append(prompt_tokens())
        assert lengths[1] > lengths[0] + 10, "the first exchange was not sent along"
        page.click("#new-chat")
        assert page.js("$('#log').childElementCount") == 0 and page.js("document.activeElement.id") == "prompt"
        page.ask("What is TTFT?")
        page.wait(ANSWERED)
        assert prompt_tokens() == lengths[0]

    def test_settings_count_only_when_chosen(self, page: Page) -> None:
        def bodies() -> list[dict[str, Any]]:
            return page.js("sent")

        page.driver.execute_script(REMEMBER_BODIES)
        page.ask("What is TTFT?")
        page.wait(ANSWERED)
        assert bodies()[-1].keys() == {"messages", "stream", "stream_options"}
        page.click("#settings summary")
        for name in ("temperature", "top_p", "top_k", "max_tokens"):
            page.js(f"$('#{name}').focus()")
            page.press(LEFT)
        page.js("$('#max_tokens').focus()")
        page.press(HOME)
        page.js("$('#seed').focus()")
        page.press("7")
        page.js("$('#system').focus()")
        page.press("Be brief.")
        page.ask("What is TTFT?")
        page.wait("$$('.answer[aria-busy=false]').length === 2")
        body = bodies()[-1]
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        chosen = {name: body[name] for name in ("temperature", "top_p", "top_k", "max_tokens", "seed")}
        assert chosen == {"temperature": 0.95, "top_p": 0.95, "top_k": 49, "max_tokens": 8, "seed": 7}
        last = page.js("$('.answer:last-child .facts').lastChild.textContent")
        assert last == "cut at the token limit"
        page.click("#settings-reset")
        page.ask("What is TTFT?")
        page.wait("$$('.answer[aria-busy=false]').length === 3")
        assert bodies()[-1].keys() == {"messages", "stream", "stream_options"}

    @pytest.mark.parametrize("how", ["button", "escape", "new chat", "leaving"])
    def test_stopping_frees_the_blocks(self, endless_page: Page, endless: Running, how: str) -> None:
        page, before = endless_page, endless.stats().num_generated_tokens
        page.ask("Tell me a story.")
        page.wait("Number($('#picture').dataset.mine) >= 3")
        assert page.js("$('#running .mine .name').textContent") == "your chat"
        assert endless.stats().num_running == 1
        if how == "button":
            page.click("#stop")
        elif how == "escape":
            page.press(ESCAPE)
        elif how == "new chat":
            page.click("#new-chat")
        else:
            page.driver.get("about:blank")
        page.wait(endless.is_idle)
        assert endless.stats().num_generated_tokens - before < 900, "the answer went on to its end"
        if how == "leaving":
            return
        page.wait(IDLE)
        assert page.js("$('#running').childElementCount") == 0
        assert page.js("[$('#send').hidden, $('#stop').hidden]") == [False, True]
        if how != "new chat":
            page.wait(ANSWERED)
            assert page.js("$('.answer .facts [data-i18n=answer_stopped]').textContent") == "stopped"
            assert page.js("$('.answer .text').textContent.length") > 20
        assert page.console() == []

    def test_text_is_never_html(self, page: Page) -> None:
        evil = "<img src=x onerror=\"document.title='evil'\"><b>bold</b>"
        page.ask(evil)
        page.wait(ANSWERED)
        assert page.js("$('.question .text').textContent") == evil
        assert page.js("$$('#log img, #log b').length") == 0 and page.js("document.title") != "evil"
        ways = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(")
        assert [file for file in PAGE.glob("*.js") if ways.search(file.read_text())] == []


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "count_blocks",
        "parameters": {"type": "object", "properties": {"tokens": {"const": 100}}, "required": ["tokens"]},
    },
}


class TestTools:
    def prepare(self, page: Page) -> None:
        page.driver.execute_script(REMEMBER_BODIES)
        page.click("#tools-settings summary")

    def test_a_call_its_result_and_an_answer(self, page: Page) -> None:
        self.prepare(page)
        page.js("$('#tools').value = arguments[0]", json.dumps([TOOL]))
        page.click("#tools-required")
        page.ask("How many blocks do 100 tokens need?")
        page.wait("$('.call textarea')")
        card = "[$('.call h4').textContent, $('.call pre').textContent, $('.call label').textContent]"
        assert page.js(card) == ["Call of count_blocks", '{"tokens": 100}', "Its result"]
        facts = page.js("$$('.answer .facts span').map((e) => e.dataset.i18n)")
        assert facts == ["answer_tokens", "answer_rate", "answer_ttft", "answer_prompt"]
        page.press("7")
        page.click(".calls button")
        page.wait("$$('.answer[aria-busy=false]').length === 2")
        body = page.js("sent")[-1]
        question, call, result = body["messages"]
        assert body["tools"] == [TOOL] and "tool_choice" not in body
        assert page.js("sent")[-2]["tool_choice"] == "required"
        assert question == {"role": "user", "content": "How many blocks do 100 tokens need?"}
        (made,) = call["tool_calls"]
        assert made["function"] == {"name": "count_blocks", "arguments": '{"tokens": 100}'}
        assert result == {"role": "tool", "tool_call_id": made["id"], "content": "7"}
        assert page.js("[$$('.question').length, $$('.calls button').length]") == [1, 0]
        assert page.js("$('.call textarea').readOnly")

    def test_a_question_instead_of_a_result(self, page: Page) -> None:
        """It is as if the call had not been made, and nobody is asked for its result any more."""
        self.prepare(page)
        page.js("$('#tools').value = arguments[0]", json.dumps([TOOL]))
        page.click("#tools-required")
        page.ask("How many blocks do 100 tokens need?")
        page.wait("$('.call textarea')")
        page.click("#tools-required")
        page.ask("What is TTFT?")
        page.wait("$$('.answer[aria-busy=false]').length === 2")
        assert [message["role"] for message in page.js("sent")[-1]["messages"]] == ["user", "user"]
        assert page.js("$$('.calls:first-of-type button').length") == 0

    def test_the_tutor_calls_by_itself(self, page: Page) -> None:
        self.prepare(page)
        page.click("#tools-example")
        names = [tool["function"]["name"] for tool in json.loads(page.js("$('#tools').value"))]
        assert names == ["lookup_term", "kv_cache_size", "count_blocks"]
        page.ask("How many blocks do 1000 tokens need with a block size of 16?")
        page.wait("$('.call textarea')")
        card = page.js("[$('.call h4').textContent, $('.call pre').textContent]")
        assert card == ["Call of count_blocks", '{"tokens": 1000, "block_size": 16}']
        page.press("63")
        page.click(".calls button")
        page.wait("$$('.answer[aria-busy=false]').length === 2")
        assert "63" in page.js("$('.answer:last-child .text').textContent")

    def test_an_answer_with_a_schema(self, page: Page) -> None:
        self.prepare(page)
        schema = {"type": "object", "properties": {"tokens": {"const": 100}}, "required": ["tokens"]}
        page.js("$('#schema').value = arguments[0]", json.dumps(schema))
        page.ask("How many tokens?")
        page.wait(ANSWERED)
        assert page.js("$('.answer .text').textContent") == '{\n  "tokens": 100\n}'
        page.ask("And now?")
        page.wait("$$('.answer[aria-busy=false]').length === 2")
        assert page.js("sent")[-1]["messages"][1] == {"role": "assistant", "content": '{"tokens": 100}'}

    def test_what_is_no_json_is_not_sent(self, page: Page) -> None:
        self.prepare(page)
        for field, words in (("tools", "The tools are not JSON: "), ("schema", "The schema is not JSON: ")):
            page.js(f"$('#{field}').value = '[1,'")
            page.ask("What is TTFT?")
            page.wait("$('#tools-wrong .error')")
            assert page.js("$('#tools-wrong').textContent").startswith(words)
            assert page.js("[$('#prompt').value, $('#log').childElementCount]") == ["What is TTFT?", 0]
            page.js(f"$('#prompt').value = $('#{field}').value = ''")
        page.ask("What is TTFT?")
        page.wait(ANSWERED)
        assert page.js("$('#tools-wrong').childElementCount") == 0 and "tools" not in page.js("sent")[-1]


class TestPicture:
    def test_blocks_fill_and_free(self, page: Page, server: Running) -> None:
        page.wait(IDLE)
        page.remember_most()
        page.ask("Tell me a story.")
        page.wait(ANSWERED)
        page.wait(IDLE)
        assert page.most("mine") >= 4 and page.most("used") >= 4 and page.most("running") >= 1
        blocks, stats = page.blocks(), server.stats()
        assert blocks["total"] == stats.num_blocks and blocks["free"] == stats.num_free_blocks
        assert blocks["cached"] == stats.num_cached_blocks > 0
        summary = page.js("$('#kv-summary').textContent")
        assert summary.startswith("1,024 blocks of 16 tokens: 0 in use (0 by your chat, 0 shared)"), summary

    def test_eight_at_once(self, page: Page) -> None:
        page.remember_most()
        page.click("#demo-send")
        page.wait("$('#demo-result').dataset.i18n === 'demo_took'")
        answers = page.js("$$('#demo-answers .text').map((e) => e.textContent)")
        assert len(answers) == 8 and all(answers)
        assert "first token" in answers[4] and "块" in answers[5]
        page.wait(IDLE)
        assert page.most("running") == 8 and page.most("shared") >= 2 and page.most("mine") == 0

    def test_cells_have_their_owners_colours(self, endless_page: Page) -> None:
        def pixels(name: str) -> int:
            """How many of the canvas are of this colour."""
            return page.js(
                """(() => {
                    const wanted = getComputedStyle(document.documentElement).getPropertyValue(arguments[0])
                        .match(/\\d+/g).map(Number);
                    const canvas = $("#picture");
                    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                    let count = 0;
                    for (let i = 0; i < data.length; i += 4)
                        count += wanted.every((value, j) => data[i + j] === value);
                    return count;
                })()""",
                name,
            )

        page = endless_page
        for fold in (True, False):  # 20,000 blocks: without folding, each is a dot
            if page.js("$('#fold').checked") != fold:
                page.click("#fold")
            page.wait(lambda: pixels("--mine") == 0)
            page.ask("Tell me a story.")
            page.wait("Number($('#picture').dataset.mine) >= 3")
            page.wait(lambda fold=fold: pixels("--mine") >= (500 if fold else 5))
            page.press(ESCAPE)
            page.wait(IDLE)
            page.wait(lambda: pixels("--mine") == 0)

    def test_a_block_is_put_into_words(self, endless_page: Page) -> None:
        page = endless_page
        page.ask("Tell me a story.")
        page.wait("Number($('#picture').dataset.mine) >= 2")
        page.js("$('#picture').focus()")
        told = page.js("$('#readout').textContent")
        assert re.fullmatch(r"Block \d+: your chat; 16 of 16 slots filled", told), told
        assert page.js("$('#picture').getAttribute('aria-valuetext')") == told
        page.press(END)
        assert page.js("$('#readout').textContent") == "Block 19999: free"
        assert page.js("$('#picture').getAttribute('aria-valuenow')") == "19999"
        page.driver.execute_script("document.activeElement.blur()")
        canvas = page.driver.find_element("id", "picture")
        hover(page, canvas, 60, 15)
        page.wait("$('#readout').textContent.startsWith('Block 0: your chat')")
        page.press(ESCAPE)

    def test_who_waits(self, endless_page: Page, endless: Running) -> None:
        page = endless_page
        with ExitStack() as others:
            for _ in range(2):
                others.enter_context(endless_request(endless))
            page.ask("Tell me a story.")
            page.wait("$('#engine').dataset.waiting === '1' && $('#engine').dataset.running === '2'")
            page.wait("$('#waiting .mine')")
            assert page.js("$('#waiting .name').textContent") == "your chat"
            assert page.js("$$('#running .name').every((e) => e.textContent.startsWith('request chatcmpl-'))")
            assert page.js("$('.answer .facts span').textContent") == "Waiting for the first token…"
            page.click("#stop")
            page.wait("$('#engine').dataset.waiting === '0'")


class TestCanvas:
    @pytest.mark.parametrize(("language", "label"), [("en", "step 1 of 48"), ("zh", "第 1 步，共 48 步")])
    def test_each_step_is_shown_and_can_be_seen_again(
        self, browser: Any, diffusion: Running, language: str, label: str
    ) -> None:
        page = Page(browser, diffusion.url, language=language, scheme="dark" if language == "zh" else "light")
        page.wait_until_live()
        page.driver.execute_script("""
            window.masks = [];
            new MutationObserver(() => masks.push(document.querySelectorAll(".cells i").length))
                .observe(document.querySelector("#log"), { childList: true, subtree: true });
            document.querySelector("#max_tokens").value = 48;
            document.querySelector("#max_tokens").dispatchEvent(new Event("input"));
        """)
        page.ask("What is a canvas?")
        page.wait(ANSWERED)
        slider = "$('.canvas input')"
        num_steps = page.js(f"Number({slider}.max)")
        seen = page.js("masks")
        assert len(set(seen)) > 5 and seen[-1] == 0
        page.js(f"{slider}.focus()")
        page.press(HOME)
        if num_steps == 48:  # unless it ended early
            assert page.js("$('.canvas output').textContent") == label
        assert page.js("$$('.cells i').length") == 47
        assert page.js("$$('.cells b').length") == 1
        page.press(END)
        assert page.js("$$('.cells i').length") == 0
        assert page.js("$$('.cells b').length") >= 1
        assert [found for found in page.js(CONTRASTS) if found[0] < 4.5] == []
        assert page.console() == []
        page.driver.get("about:blank")
        page.wait(diffusion.is_idle)


class TestTrouble:
    def test_a_full_queue_and_another_try(self, endless_page: Page, endless: Running) -> None:
        page = endless_page
        with ExitStack() as others:
            for _ in range(3):
                others.enter_context(endless_request(endless))
            page.ask("Tell me a story.")
            page.wait("$('#log .error[role=alert]')")
            assert "queue is full" in page.js("$('#log .error p').textContent")
        page.wait(endless.is_idle)
        page.click("#log .error button")
        page.wait("$('.answer .text').textContent.length > 20")
        assert page.js("[$$('.question').length, $$('#log .error').length]") == [1, 0]
        page.press(ESCAPE)

    def test_a_request_that_is_refused(self, browser: Any, server: Running) -> None:
        page = Page(browser, server.url)
        page.wait_until_live()
        page.js("$('#prompt').value = 'word '.repeat(3000)")
        page.js("$('#ask').requestSubmit()")
        page.wait("$('#log .error[role=alert]')")
        told = page.js("$('#log .error p').textContent")
        assert told.startswith("The server refused the request: ") and "maximum context length is 1024 tokens" in told

    def test_a_server_that_goes_and_comes_back(self, browser: Any) -> None:
        config: dict[str, Any] = {"dtype": "float32", "num_gpu_blocks": 64}
        with running(AsyncLLMEngine(**config)) as server:
            page = Page(browser, server.url)
            page.wait_until_live()
        page.wait("$('#connection').dataset.state === 'connection_lost'")
        assert page.js("$('#connection-text').textContent") == "Connection lost; trying again"
        page.ask("What is TTFT?")
        page.wait("$('#log .error[role=alert]')")
        assert page.js("$('#log .error p').textContent") == "The server cannot be reached. Is it still running?"
        with running(AsyncLLMEngine(**config), port=server.address[1]):
            page.wait_until_live()
            page.click("#log .error button")
            page.wait(ANSWERED)
            assert "first token" in page.js("$('.answer .text').textContent")
            browser.get("about:blank")

    def test_the_key_is_asked_for_and_kept_for_the_tab(self, browser: Any) -> None:
        with running(AsyncLLMEngine(dtype="float32", num_gpu_blocks=64), api_key="sesame") as server:
            page = Page(browser, server.url)
            page.wait("$('#key-dialog').open")
            page.press("wrong", "\n")
            page.wait("$('#key-dialog').open && $('#key-wrong').checkVisibility()")
            page.press("sesame", "\n")
            page.wait_until_live()
            page.ask("What is TTFT?")
            page.wait(ANSWERED)
            assert "first token" in page.js("$('.answer .text').textContent")
            browser.refresh()
            page.wait_until_live()
            assert not page.js("$('#key-dialog').open")
            assert page.js("Object.values(sessionStorage)") == ["sesame"]
            assert "sesame" not in page.js("JSON.stringify(localStorage)") + browser.current_url
            page.driver.execute_script("sessionStorage.clear()")
            browser.refresh()
            page.wait("$('#key-dialog').open")
            page.press(ESCAPE)  # no key, then
            page.wait("$('#connection').dataset.state === 'connection_key'")
            browser.get("about:blank")


class TestLanguages:
    def test_the_table_is_complete(self, page: Page) -> None:
        table = page.driver.execute_async_script("import('/page/strings.js').then((m) => arguments[0](m.STRINGS))")
        assert len(table) > 80
        for key, texts in table.items():
            assert texts.keys() == {"en", "zh"}, key
            english, chinese = (re.sub(r"\{\w+\}", "", texts[language]) for language in ("en", "zh"))
            assert english and not CHINESE.search(english), key
            assert chinese and (CHINESE.search(chinese) or not re.search(r"\w", english)), key
            names = [set(re.findall(r"\{(\w+)", text)) for text in texts.values()]
            assert names[0] == names[1], f"{key}: the languages are filled with different values"
        sources = "".join(file.read_text() for file in PAGE.iterdir() if file.name != "strings.js")
        used = set(re.findall(r"data-i18n(?:-[\w-]+)?=\"(\w+)\"", sources))
        assert used <= table.keys(), used - table.keys()
        unused = {key for key in table if not re.search(rf"\"{key}\"|\[\"{key}\"", sources)}
        assert not unused, unused

    def test_the_switch_changes_every_word(self, page: Page) -> None:
        page.ask("What is TTFT?")
        page.wait(ANSWERED)
        page.click("#demo-send")
        page.wait("$('#demo-result').dataset.i18n === 'demo_took'")
        page.wait(IDLE)
        page.driver.execute_script("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
        assert page.js("document.documentElement.lang") == "en"
        english = page.js(WORDS)
        page.click("[data-language=zh]")
        chinese = page.js(WORDS)
        assert len(english) == len(chinese) > 60
        assert [both for both in zip(english, chinese, strict=True) if both[0] == both[1]] == []
        assert [text for text in english if CHINESE.search(text)] == []
        assert [text for text in chinese if not CHINESE.search(text)] == []
        assert page.js("document.documentElement.lang") == "zh-CN" and CHINESE.search(page.js("document.title"))
        page.driver.refresh()
        page.wait_until_live()
        assert page.js("document.documentElement.lang") == "zh-CN", "the choice was forgotten"
        page.click("[data-language=en]")
        assert page.js(WORDS)[:5] == english[:5]

    @pytest.mark.parametrize(("language", "shown"), [("zh-TW", "zh-CN"), ("en-GB", "en"), ("de-DE", "en")])
    def test_the_browsers_language_comes_first(self, browser: Any, server: Running, language: str, shown: str) -> None:
        page = Page(browser, server.url, language=language)
        page.wait_until_live()
        assert page.js("document.documentElement.lang") == shown


class TestForEverybody:
    def test_no_other_host(self, browser: Any, server: Running) -> None:
        page = Page(browser, server.url)
        page.wait_until_live()
        page.ask("What is TTFT?")
        page.wait(ANSWERED)
        page.click("#demo-send")
        page.wait("$('#demo-result').dataset.i18n === 'demo_took'")
        asked = [url for url in page.requests() if not url.startswith(("data:", "about:", "chrome:"))]
        assert f"{server.url}/v1/chat/completions" in asked and f"{server.url}/page/main.js" in asked
        assert [url for url in asked if not url.startswith(f"{server.url}/")] == []
        assert page.js("performance.getEntriesByType('resource').every((e) => e.name.startsWith(location.origin))")
        for file in PAGE.iterdir():
            assert re.findall(r"https?://[^\"'\s]+", file.read_text()) in ([], ["http://www.w3.org/2000/svg"]), file

    @pytest.mark.parametrize("language", ["en", "zh"])
    def test_a_phone(self, browser: Any, server: Running, language: str) -> None:
        page = Page(browser, server.url, language=language, width=360)
        page.wait_until_live()

        def fits() -> bool:
            return page.js("document.documentElement.scrollWidth <= 360 && innerWidth === 360")

        assert fits()
        page.driver.execute_script("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
        page.driver.execute_script("""
            window.widest = 0;  // while something runs, however soon it is over
            new MutationObserver(() => {
                window.widest = Math.max(window.widest, document.documentElement.scrollWidth);
            }).observe(document.getElementById("running"), { childList: true });
        """)
        page.click("#demo-send")
        page.ask("What is a KV cache? " + "a" * 100)
        page.wait("$('#demo-result').dataset.i18n === 'demo_took'")
        page.wait(ANSWERED)
        assert page.js("window.widest") == 360
        assert fits()
        small = page.js("""$$("button, select, summary, input").filter((e) => e.checkVisibility()).filter((e) => {
            const { width, height } = (e.closest("label") ?? e).getBoundingClientRect();
            return width < 24 || height < 24;
        }).map((e) => e.outerHTML)""")
        assert small == [], "too small for a finger"

    def test_with_the_keyboard_alone(self, endless_page: Page) -> None:
        page = endless_page
        page.driver.execute_script("document.body.tabIndex = -1; document.body.focus()")
        order = []
        while "fold" not in order:
            page.press(TAB)
            focused = "(({ id, dataset, className }) => id || dataset.language || className)(document.activeElement)"
            order.append(page.js(focused))
            assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid", order
            assert len(order) < 40, order
        landmarks = ["skip", "en", "zh", "theme", "new-chat", "log", "prompt", "send", "demo-send", "picture", "fold"]
        assert [name for name in order if name in landmarks] == landmarks

        page.driver.execute_script("document.body.focus()")
        page.press(TAB, "\n")  # the way round the header
        page.wait("document.activeElement.id === 'prompt'")
        page.press("Tell me")
        page.press_with_shift("\n")
        page.press("a story.")
        assert page.js("$('#prompt').value") == "Tell me\na story."
        page.press("\n")
        page.wait("$('.answer .text').textContent.length > 10")
        assert page.js("[$('#prompt').value, $('#log').ariaBusy]") == ["", "true"]
        page.press(TAB)
        assert page.js("document.activeElement.id") == "stop"
        page.press("\n")
        page.wait("document.activeElement.id === 'prompt' && $('#log').ariaBusy === 'false'")
        page.press("Again", "\n")
        page.wait("$$('.answer').length === 2 && $('.answer:last-child .text').textContent.length > 10")
        page.press(ESCAPE)
        page.wait("$$('.answer[aria-busy=false]').length === 2")
        unnamed = page.js("""$$("button, input, select, textarea, canvas[tabindex], progress, [role=log], section")
            .filter((e) => !(e.ariaLabel || e.hasAttribute("aria-labelledby") || e.labels?.length || e.textContent))
            .map((e) => e.outerHTML)""")
        assert unnamed == []

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_colours(self, browser: Any, server: Running, scheme: str) -> None:
        def brightness() -> int:
            return page.js("Number(getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/)[0])")

        page = Page(browser, server.url, scheme=scheme)
        page.wait_until_live()
        page.ask("What is TTFT?")
        page.wait(ANSWERED)
        page.driver.execute_script("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
        assert (brightness() > 128) == (scheme == "light")
        for theme in (scheme, "dark" if scheme == "light" else "light"):
            page.js("$('#theme').focus()")
            page.press(HOME, *{"light": DOWN, "dark": DOWN + DOWN}[theme])
            page.wait(f"document.documentElement.dataset.theme === '{theme}'")
            assert (brightness() > 128) == (theme == "light")
            contrasts = page.js(CONTRASTS)
            assert len(contrasts) > 40 and [found for found in contrasts if found[0] < 4.5] == []
        page.driver.refresh()
        page.wait_until_live()
        assert page.js("document.documentElement.dataset.theme") != scheme, "the choice was forgotten"


def hover(page: Page, element: Any, x: int, y: int) -> None:
    """Point at a place in an element, in pixels from its upper left corner."""
    left, top = page.js("(({ x, y }) => [x, y])(arguments[0].getBoundingClientRect())", element)
    page.devtools("Input.dispatchMouseEvent", type="mouseMoved", x=left + x, y=top + y)


class endless_request:
    """A client that asks for an endless answer, and leaves when the context ends."""

    def __init__(self, server: Running) -> None:
        self._stack = ExitStack()
        self._url = f"{server.url}/v1/chat/completions"

    def __enter__(self) -> None:
        body = {"messages": [{"role": "user", "content": "Go on."}], "stream": True}
        self._stack.enter_context(httpx.stream("POST", self._url, json=body, timeout=60))  # now it is in the queue

    def __exit__(self, *error: object) -> None:
        self._stack.close()
