"""What a page that shows a module says."""

from __future__ import annotations

import html
import re


def words(page):
    """What a page says, without its scripts."""
    text = re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(text).split())
