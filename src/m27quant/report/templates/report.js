"use strict";
(() => {
  const tip = document.getElementById("tip");
  const show = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect(), gap = 14;
    tip.style.left = Math.max(4, x + gap + box.width > innerWidth ? x - gap - box.width : x + gap) + "px";
    tip.style.top = Math.max(4, y + gap + box.height > innerHeight ? y - gap - box.height : y + gap) + "px";
  };
  const hide = () => { tip.hidden = true; };

  document.addEventListener("pointermove", (event) => {
    const target = event.target.closest("[data-tip]");
    if (target) show(target.dataset.tip, event.clientX, event.clientY);
    else if (!event.target.closest("svg.map")) hide();
  });
  document.addEventListener("pointerleave", hide);
  document.addEventListener("scroll", hide, true);

  const theme = document.getElementById("theme");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const root = document.documentElement;
    const dark = (root.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    root.style.colorScheme = dark ? "light" : "dark";
  });

  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));

  const stored = document.getElementById("cells");
  if (!stored) return;
  const cells = JSON.parse(stored.textContent);
  const readout = document.getElementById("readout");
  const format = (v) => v === null ? "none"
    : v !== 0 && Math.abs(v) < 1e-3 ? v.toExponential(2)
    : v.toLocaleString("en", { maximumSignificantDigits: 6 });
  for (const map of document.querySelectorAll("svg.map")) {
    const image = map.querySelector("image"), cursor = map.querySelector(".cursor");
    const layers = +map.dataset.layers, experts = +map.dataset.experts;
    let layer = 0, expert = 0;
    const move = (l, e) => {
      layer = Math.min(layers - 1, Math.max(0, l));
      expert = Math.min(experts - 1, Math.max(0, e));
      cursor.setAttribute("x", +image.getAttribute("x") + expert * image.getAttribute("width") / experts);
      cursor.setAttribute("y", +image.getAttribute("y") + layer * image.getAttribute("height") / layers);
      cursor.classList.add("on");
      const rows = cells.map((m) => m.title + ": " + format(m.values[layer * experts + expert]));
      const head = "layer " + layer + ", expert " + expert;
      readout.textContent = head + " \u00b7 " + rows.join(" \u00b7 ");
      return head + "\n" + rows.join("\n");
    };
    map.addEventListener("pointermove", (event) => {
      const box = image.getBoundingClientRect();
      const e = Math.floor((event.clientX - box.left) / box.width * experts);
      const l = Math.floor((event.clientY - box.top) / box.height * layers);
      if (e < 0 || l < 0 || e >= experts || l >= layers) hide();
      else show(move(l, e), event.clientX, event.clientY);
    });
    map.addEventListener("pointerleave", hide);
    map.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      move(layer + step[0], expert + step[1]);
    });
  }
})();
