"""MkDocs hook: show docstrings in the markup of the Hugging Face libraries as readers expect them.

Those docstrings write references as [`Name`] and types as `int`, *optional*, defaults to `1`; the tables of the API
pages have a column for defaults already.
"""

import re


def on_page_content(html: str, **kwargs) -> str:
    html = re.sub(r"\[<code>~?([^<]*)</code>\](?!\()", r"<code>\1</code>", html)

    def plain_type(match: re.Match) -> str:
        text = re.sub(r", \*optional\*(, defaults to .*)?$", "", match[1], flags=re.DOTALL)
        return f"<code>{text.replace('`', '')}</code>"

    return re.sub(r"<code>([^<]*`[^<]*)</code>", plain_type, html)
