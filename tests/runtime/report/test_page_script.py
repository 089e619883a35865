import re

import pytest

from runtime.report.page_script import joined, library, page_script


def test_modules_become_one_script_in_the_order_of_their_imports() -> None:
    sources = {
        "main": 'import * as b from "./b.js";\nimport {\n  one, Two } from "./a.js";\nb.go(one, Two);',
        "b": 'import { one } from "./a.js";\nexport async function go() { return one; }',
        "a": "export const one = 1;\nconst hidden = 2;\nexport class Two {}",
    }
    assert joined(sources.__getitem__, "main").splitlines() == [
        "const $a = (() => {", "const one = 1;", "const hidden = 2;", "class Two {}", "return { one, Two };", "})();",
        "const $b = (() => {", "const { one } = $a;", "async function go() { return one; }", "return { go };", "})();",
        "const $main = (() => {", "const b = $b;", "const {", "  one, Two } = $a;", "b.go(one, Two);", "return {  };",
        "})();",
    ]  # fmt: skip


@pytest.mark.parametrize("line", ["export default 1;", 'import "./a.js";', 'export { one } from "./a.js";'])
def test_a_module_of_another_form_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"main.js has an import or export"):
        joined({"main": line}.__getitem__, "main")


def test_the_report_has_the_pages_own_parts_and_asks_no_server() -> None:
    script = page_script()
    assert re.findall(r"^const \$(\w+) = ", script, re.MULTILINE)[-1] == "report"
    for part in ("chart", "heat", "balance", "overview", "window", "parts"):
        assert script.count(f"const ${part} = ") == 1
    assert not re.search(r"fetch\(|EventSource|XMLHttpRequest|import\(", script)
    assert "</" not in script and "</" not in library()
    assert "Permission is hereby granted" in library()
