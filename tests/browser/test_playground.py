"""The playground in a real browser: send, stream, stop, change a parameter, read the log-probabilities."""

import time

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from llama.text.chat import ChatTemplate
from tests.browser.browser import chromium
from tests.server.helpers import TOKENIZER, running, scripted_llm
from tests.server.test_reasoning import CONTENT, SAID, TEMPLATE, THOUGHT

PATIENCE = 20


@pytest.fixture
def page(browser, site):
    open_page(browser, site)
    yield browser
    severe = [
        entry
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE" and "with a status" not in entry["message"]
    ]
    assert severe == [], "nothing is blocked by the page's own policy, and no script fails"


def open_page(driver, site):
    driver.get(site.url)
    put(driver, "key", "secret")
    wait(driver, lambda d: d.find_elements(By.CSS_SELECTOR, "#model option"))


def wait(driver, condition):
    return WebDriverWait(driver, PATIENCE, poll_frequency=0.02).until(condition)


def put(driver, name, value):
    driver.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'));",
        name,
        str(value),
    )


def test_the_key_field_is_in_sight_where_a_key_is_wanted_and_stays(page, site):
    assert page.find_element(By.ID, "key").is_displayed()
    page.get(site.url)
    wait(page, lambda d: d.find_element(By.ID, "key").is_displayed())
    llm, _ = scripted_llm()
    with running(llm) as open_to_all:
        page.get(open_to_all.url)
        wait(page, lambda d: d.find_elements(By.CSS_SELECTOR, "#model option"))
        assert not page.find_element(By.ID, "key").is_displayed()
        page.get("about:blank")


def is_idle(driver):
    return driver.find_element(By.ID, "send").is_displayed()


def send(driver, text):
    driver.find_element(By.ID, "input").send_keys(text, Keys.ENTER)


def ask(driver, text):
    send(driver, text)
    wait(driver, lambda d: is_idle(d) and d.find_elements(By.CSS_SELECTOR, ".assistant:last-child .copy"))
    return driver.find_elements(By.CSS_SELECTOR, ".assistant .text")[-1]


def test_a_conversation(page, site):
    assert ask(page, "Grüße 🙂").text == "Grüße 🙂"
    assert ask(page, "Again").text == "Again"
    asked = site.engine.asked[-1]
    assert "Grüße 🙂" in asked.text and asked.text.count("assistant") == 2
    facts = page.find_elements(By.CSS_SELECTOR, ".facts")[-1].text
    assert "6 tokens" in facts and "tokens/s" in facts and "first token" in facts and "stop" in facts
    page.find_element(By.ID, "new").click()
    assert not page.find_elements(By.CSS_SELECTOR, ".message")


def test_streaming_and_stopping(page, site):
    site.engine.before_step = lambda: time.sleep(0.01)
    try:
        send(page, "forever")
        stop = page.find_element(By.ID, "stop")
        wait(page, lambda d: len(d.find_elements(By.CSS_SELECTOR, ".token")) > 3)
        assert stop.is_displayed() and not is_idle(page)
        first = len(page.find_elements(By.CSS_SELECTOR, ".token"))
        wait(page, lambda d: len(d.find_elements(By.CSS_SELECTOR, ".token")) > first)
        stop.click()
        wait(page, lambda d: is_idle(d) and site.llm.num_requests == 0)
        assert "stopped" in page.find_elements(By.CSS_SELECTOR, ".facts")[-1].text
        send(page, "forever")
        wait(page, lambda d: not is_idle(d))
        ActionChains(page).send_keys(Keys.ESCAPE).perform()
        wait(page, is_idle)
    finally:
        site.engine.before_step = lambda: None


def test_parameters(page, site):
    for name, value in {"temperature": 1.5, "max_tokens": 3, "top_p": 0.5, "top_k": 9, "min_p": 0.1}.items():
        put(page, name, value)
    put(page, "seed", 2**62 + 1)
    put(page, "stops", "x y\nz")
    put(page, "system", "Be brief.")
    assert ask(page, "abcdef").text == "abc"
    params = site.engine.asked[-1].params
    assert (params.temperature, params.max_tokens, params.top_p, params.top_k, params.min_p) == (1.5, 3, 0.5, 9, 0.1)
    assert (params.seed, params.stop) == (2**62 + 1, ("x y", "z"))
    assert "system<|end_header_id|>\n\nBe brief.<|eot_id|>" in site.engine.asked[-1].text
    assert "cut at max tokens" in page.find_elements(By.CSS_SELECTOR, ".facts")[-1].text
    page.find_element(By.ID, "reset").click()
    assert page.find_element(By.ID, "temperature").get_attribute("value") == "0.7"


def test_probabilities_by_pointer_and_by_keyboard(page):
    text = ask(page, "Hi!")
    tokens = text.find_elements(By.CSS_SELECTOR, ".token")
    assert [token.text for token in tokens] == ["H", "i", "!"]
    peek = page.find_element(By.ID, "peek")
    assert not peek.is_displayed()
    ActionChains(page).move_to_element(tokens[1]).perform()
    wait(page, lambda d: peek.is_displayed())
    assert "log-probability -0.500" in peek.text and "60.7%" in peek.text
    page.execute_script("arguments[0].focus()", text)
    ActionChains(page).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT).perform()
    assert page.find_element(By.CSS_SELECTOR, ".token.current").text == "i" and peek.is_displayed()
    # What a screen reader hears of: an answer is a group with a name, and the probabilities of a token are told.
    assert [node.aria_role for node in (text, peek, page.find_element(By.ID, "form"))] == ["group", "status", "form"]
    page.find_element(By.ID, "heat").click()
    assert "heat" in page.find_element(By.TAG_NAME, "body").get_attribute("class")
    page.find_element(By.ID, "heat").click()


def test_the_seed_can_be_used_again(page):
    ask(page, "x")
    seed = page.find_element(By.CSS_SELECTOR, ".seed")
    seed.click()
    assert page.find_element(By.ID, "seed").get_attribute("value") == seed.text.removeprefix("seed ")


def test_errors_are_told_and_the_message_is_kept(page):
    put(page, "temperature", 9)
    send(page, "Hello")
    error = wait(page, lambda d: d.find_elements(By.CSS_SELECTOR, ".error"))[0]
    assert "temperature must be a number from 0 to 5" in error.text
    wait(page, is_idle)
    assert page.find_element(By.ID, "input").get_attribute("value") == "Hello"
    put(page, "key", "wrong")
    put(page, "temperature", 1)
    page.find_element(By.ID, "send").click()
    wait(page, lambda d: any("API key" in e.text for e in d.find_elements(By.CSS_SELECTOR, ".error")))


@pytest.mark.parametrize("with_probabilities", [True, False])
def test_a_thought_is_shown_and_is_no_part_of_the_answer(page, with_probabilities):
    llm, engine = scripted_llm()
    llm.llm.inputs.template = ChatTemplate(TOKENIZER, {"default": TEMPLATE})
    with running(llm) as thinking:
        page.get(thinking.url)
        wait(page, lambda d: d.find_elements(By.CSS_SELECTOR, "#model option"))
        page.execute_script("document.getElementById('probabilities').checked = arguments[0]", with_probabilities)
        page.execute_script("send(arguments[0])", SAID)
        wait(page, lambda d: d.find_elements(By.CSS_SELECTOR, ".copy"))
        shown = "".join(e.get_attribute("textContent") for e in page.find_elements(By.CSS_SELECTOR, ".thought"))
        assert shown == THOUGHT
        whole = page.find_element(By.CSS_SELECTOR, ".assistant .text").get_attribute("textContent")
        assert whole == shown + CONTENT
        page.execute_script("send('x</think>y')")
        wait(page, lambda d: len(d.find_elements(By.CSS_SELECTOR, ".copy")) == 2)
        assert (
            f"{CONTENT}<|eot_id|>" in engine.asked[-1].text and "<b" not in engine.asked[-1].text.split(CONTENT)[0][-9:]
        )
        page.get("about:blank")


def test_the_page_on_a_phone(site):
    with chromium(390, 844, dark=True) as driver:
        open_page(driver, site)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        side = driver.find_element(By.ID, "side")
        assert not side.is_displayed()
        driver.find_element(By.ID, "open-side").click()
        wait(driver, lambda d: side.is_displayed() and side.rect["x"] < 40)
        driver.find_element(By.ID, "close-side").click()
        wait(driver, lambda d: not side.is_displayed())
        assert ask(driver, "Hello").text == "Hello"
        background = driver.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
        assert sum(map(int, background.strip("rgba()").split(",")[:3])) < 150, "dark mode is dark"


def test_the_policy_lets_nothing_else_run(site):
    import httpx

    response = httpx.get(site.url)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "://" not in response.text.replace("http://www.w3.org/2000/svg", "")
