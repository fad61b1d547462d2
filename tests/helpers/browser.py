"""A Chromium for tests: the system's where there is one ($CHROMIUM names it), else the one that Playwright installs.

python -m tests.helpers.browser     # whether one can be started
"""

import contextlib
import os
import shutil
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome")


def executable() -> str | None:
    """The system's, by its path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def chromium():
    """Started, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable())
        try:
            yield browser
        finally:
            browser.close()


if __name__ == "__main__":
    from playwright.sync_api import Error

    try:
        with chromium() as browser:
            print(f"Chromium {browser.version}")
    except Error as error:
        sys.exit(f"Chromium cannot be started: {str(error).splitlines()[0]}")
