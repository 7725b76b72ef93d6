"use strict";
(() => {
  let count = 0;
  const field = id => document.querySelector(`#${id} textarea, #${id} input`);
  const press = id => { const b = document.getElementById(id); if (b) b.click(); };
  // clicks on cards reach Python through a hidden text box; the counter makes each text a new one
  const act = text => {
    const box = field("vlv-do");
    if (!box) return;
    box.value = `${text}#${++count}`;
    box.dispatchEvent(new Event("input", {bubbles: true}));
  };
  document.addEventListener("click", event => {
    const target = event.target.closest && event.target.closest("[data-vlv]");
    if (target) act(target.dataset.vlv);
  });
  const visible = id => { const x = document.getElementById(id); return x && x.offsetParent !== null; };
  const tabs = {
    "vlv-editor": {
      j: "vlv-next", ArrowRight: "vlv-next", k: "vlv-back", ArrowLeft: "vlv-back", PageDown: "vlv-page-on",
      PageUp: "vlv-page-back", d: "vlv-check", a: "vlv-mark-all", w: "vlv-write",
    },
    "vlv-arena": {
      ArrowLeft: "vlv-first", ArrowRight: "vlv-second", t: "vlv-tie", s: "vlv-skip",
      ...Object.fromEntries([..."0123456"].map(n => [n, `vlv-rate-${n}`])),
    },
  };
  document.addEventListener("keydown", event => {
    const typing = event.target.closest("input, textarea, select, [contenteditable=true]");
    const editing = typing && typing.closest("#vlv-editor");
    const control = event.ctrlKey || event.metaKey;
    if (visible("vlv-editor")) {
      if (control && event.key === "s") { event.preventDefault(); press("vlv-save"); return; }
      if (control && event.key === "Enter") { event.preventDefault(); press("vlv-save-next"); return; }
      if (event.altKey && event.key === "ArrowDown") { event.preventDefault(); press("vlv-next"); return; }
      if (event.altKey && event.key === "ArrowUp") { event.preventDefault(); press("vlv-back"); return; }
      if (editing && event.key === "PageDown") { event.preventDefault(); press("vlv-next"); return; }
      if (editing && event.key === "PageUp") { event.preventDefault(); press("vlv-back"); return; }
      if (typing && event.key === "Escape") { typing.blur(); return; }
    }
    if (typing || control || event.altKey || event.repeat) return;
    const button = event.target.closest("button, [role=tab], [role=button], summary, a");
    if (button && (event.key === "Enter" || event.key === " ")) return;
    if (button && button.getAttribute("role") === "tab" && event.key.startsWith("Arrow")) return;
    if (visible("vlv-editor")) {
      if (event.key === "e") { event.preventDefault(); field("vlv-editor").focus(); return; }
      if (event.key === "/") { event.preventDefault(); field("vlv-filter").focus(); return; }
      if (event.key === "x") { event.preventDefault(); act("mark:current"); return; }
    }
    for (const [tab, keys] of Object.entries(tabs)) {
      if (visible(tab) && visible(keys[event.key])) { event.preventDefault(); press(keys[event.key]); return; }
    }
  });
})();
