"""HTML pages: what is shown is never run, and nothing is fetched."""

from PIL import Image

from llava_moslora import pages


def test_a_page_escapes_its_title_and_keeps_its_body():
    text = pages.page("a & <b>", "<p>body</p>", ".mine { color: red; }")
    assert "<title>a &amp; &lt;b&gt;</title>" in text and "<h1>a &amp; &lt;b&gt;</h1><p>body</p></html>" in text
    assert text.index(pages.STYLE) < text.index(".mine { color: red; }") < text.index("</style>")


def test_a_table_escapes_its_cells():
    expected = "<table><tr><th>n</th><th>&lt;i&gt;</th></tr><tr><td>1</td><td>&lt;script&gt;</td></tr></table>"
    assert pages.table([(1, "<script>")], ["n", "<i>"]) == expected
    assert pages.table([]) == "<table></table>"


def test_a_thumbnail_is_inside_the_page_and_the_image_unchanged():
    image = Image.new("RGB", (40, 20))
    assert pages.thumbnail(image, 10).startswith('<img src="data:image/jpeg;base64,')
    assert pages.thumbnail(image, 10).endswith('width=10 height=5 alt="">')
    assert image.size == (40, 20)


def test_a_page_without_a_script_runs_none():
    text = pages.page("title", "<p>body</p>")
    assert "<script" not in text and "script-src" not in text
    assert """content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">""" in text


def test_a_pages_own_script_is_the_only_one_allowed():
    """The digest of ``let x = 1;``, by ``openssl dgst -sha256 -binary | base64``."""
    text = pages.begin("title", script="let x = 1;") + pages.END
    assert "<script type=module>let x = 1;</script>" in text
    assert "script-src 'sha256-qtc3jf64UXA5J6U02kfQ0Cvn9Uz4wXUaN3NNUVgR2v4='\"" in text
