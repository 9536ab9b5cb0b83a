"""Test the browser of the tests."""

import pytest

from tests.support.browser import open_browser

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_the_browser_reaches_no_other_host(tmp_path):
    exceptions = pytest.importorskip("selenium.common.exceptions", reason="selenium is not installed")
    page = tmp_path / "page.html"
    page.write_text("<title>ours</title>")
    with open_browser(tmp_path / "profile") as browser:
        browser.get(page.as_uri())
        assert browser.title == "ours"
        with pytest.raises(exceptions.WebDriverException, match="ERR_NAME_NOT_RESOLVED"):
            browser.get("http://example.com")
