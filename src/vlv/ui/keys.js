"use strict";
(() => {
  const field = id => document.querySelector(`#${id} textarea, #${id} input`);
  // a key waits for the answer to the one before, so that fast typists get what they typed
  let flying = 0;
  const ask = window.fetch;
  window.fetch = (...given) => {
    const isEvent = String(given[0] && given[0].url || given[0]).includes("/run/");
    if (!isEvent) return ask(...given);
    flying += 1;
    return ask(...given).finally(() => setTimeout(() => { flying -= 1; }, 20));
  };
  const pause = time => new Promise(done => setTimeout(done, time));
  const landed = async () => {
    await pause(5);
    for (let waited = 0; flying && waited < 5000; waited += 10) await pause(10);
  };
  let before = Promise.resolve();
  const press = id => {
    before = before.then(() => {
      const button = document.getElementById(id);
      if (!button) return null;
      button.click();
      return landed();
    });
  };
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
      if (event.key === "x") { event.preventDefault(); press("vlv-mark-current"); return; }
    }
    for (const [tab, keys] of Object.entries(tabs)) {
      if (visible(tab) && visible(keys[event.key])) { event.preventDefault(); press(keys[event.key]); return; }
    }
  });
})();
