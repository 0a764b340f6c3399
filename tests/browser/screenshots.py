#!/usr/bin/env python3
"""Take the playground's screenshots in docs/ from a running server.

python -m tests.browser.screenshots http://127.0.0.1:8000 docs
"""

import sys
from pathlib import Path

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser.browser import chromium

PATIENCE = 300
VIEWS = {
    "playground-desktop.png": {"width": 1280, "height": 800},
    "playground-dark.png": {"width": 1280, "height": 800, "dark": True},
    "playground-phone.png": {"width": 390, "height": 844, "scale": 2.0},
}


def take(url: str, path: Path, **view) -> None:
    with chromium(**view) as driver:
        driver.get(url)
        WebDriverWait(driver, PATIENCE).until(lambda d: d.find_elements(By.CSS_SELECTOR, "#model option"))
        driver.execute_script(
            "for (const [id, value] of Object.entries({temperature: 0, max_tokens: 90})) {"
            "  document.getElementById(id).value = value;"
            "  document.getElementById(id).dispatchEvent(new Event('input')); }"
        )
        for question in ("What is the capital of France?", "What is it known for?"):
            driver.find_element(By.ID, "input").send_keys(question)
            driver.find_element(By.ID, "send").click()
            WebDriverWait(driver, PATIENCE).until(lambda d: d.find_element(By.ID, "send").is_displayed())
        if view.get("dark"):
            driver.execute_script("document.getElementById('heat').click()")
        tokens = driver.find_elements(By.CSS_SELECTOR, ".assistant:last-child .token")
        ActionChains(driver).move_to_element(tokens[min(7, len(tokens) - 1)]).perform()
        driver.save_screenshot(str(path))


def main() -> None:
    url, folder = sys.argv[1], Path(sys.argv[2])
    for name, view in VIEWS.items():
        take(url, folder / name, **view)


if __name__ == "__main__":
    main()
