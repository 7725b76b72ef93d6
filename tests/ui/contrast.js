// Texts whose contrast to what lies behind them is below 4.5 : 1 (WCAG 2.2, 1.4.3).
() => {
  const parse = c => { const m = c.match(/[\d.]+/g).map(Number); return [m[0], m[1], m[2], m.length > 3 ? m[3] : 1]; };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; };
  const behind = x => { const all = []; for (; x; x = x.parentElement) all.unshift(parse(getComputedStyle(x).backgroundColor)); return all.reduce((b, a) => over(a, b), [255, 255, 255, 1]); };
  const found = [];
  for (const x of document.querySelectorAll("body *")) {
    const own = [...x.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    const isField = x.matches("input:not([type=checkbox]):not([type=radio]), textarea") && x.value;
    if (!(own || isField) || !x.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) continue;
    if (x.closest("[disabled]")) continue;
    const style = getComputedStyle(x), back = behind(x), [a, b] = [light(over(parse(style.color), back)), light(back)];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} <${x.tagName} class="${x.className}"> ${(x.value || x.textContent).trim().slice(0, 40)} ${style.color} on ${back}`);
  }
  return found;
}
