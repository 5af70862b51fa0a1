"use strict";
(() => {
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const between = (a, b, t) => a.map((v, i) => Math.round(v + (b[i] - v) * t));
  const show = (v) => (Math.abs(v) >= 1e6 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(2) : String(+v.toPrecision(4)));

  // ---------------------------------------------------------------- heat maps: bytes -> a canvas of one pixel per cell, which CSS enlarges
  const heats = [];
  for (const figure of document.querySelectorAll(".heat")) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const frames = data.frames.map((text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
    const canvas = figure.querySelector("canvas"), out = figure.querySelector("output.value");
    const pick = figure.querySelector(".frame"), view = figure.querySelector(".view");
    const R = data.rows.length, C = data.columns.length;
    const now = () => (pick ? +pick.value : frames.length - 1);
    // What a cell of the picture shows: which frame, row and column of the data.
    const place = (y, x) => (view && view.value !== "" ? [x, +view.value, y] : [now(), y, x]);
    const size = () => (view && view.value !== "" ? [C, frames.length] : [R, C]);
    const draw = () => {
      const [h, w] = size(), pixels = new ImageData(w, h);
      const cold = rgb(css("--cold")), mid = rgb(css("--mid")), hot = rgb(css("--hot")), dead = rgb(css("--dead")), value = rgb(css("--value"));
      for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) {
        const [f, r, c] = place(y, x), b = frames[f][r * C + c];
        let color;
        if (data.top === null) {
          const t = Math.max(-1, Math.min(1, (b - 128) / 25.4 / 3));
          color = b === 0 ? dead : between(mid, t < 0 ? cold : hot, Math.abs(t));
        } else color = b === 255 ? rgb(css("--card")) : between(mid, value, b / 254);
        pixels.data.set([...color, 255], 4 * (y * w + x));
      }
      canvas.width = w; canvas.height = h;
      canvas.style.height = Math.min(360, Math.max(60, h * 22)) + "px";
      canvas.getContext("2d").putImageData(pixels, 0, 0);
      const over = view && view.value !== "";
      const range = (names) => `${names[0]} to ${names[names.length - 1]}`;
      figure.querySelector(".rowlabel").textContent = (over ? `${data.column} ${range(data.columns)}` : `${data.row} ${range(data.rows)}`) + ", downwards";
      figure.querySelector(".xlabel").textContent = over ? `step ${range(data.names)}` : `${data.column} ${range(data.columns)}`;
      const label = figure.querySelector(".controls output");
      if (label) label.textContent = data.names[now()];
      if (pick) pick.disabled = Boolean(over);
    };
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect(), [h, w] = size();
      const y = Math.min(h - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * h)));
      const x = Math.min(w - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * w)));
      const [f, r, c] = place(y, x), b = frames[f][r * C + c];
      const said = data.top !== null ? (b === 255 ? "no value" : show((b / 254) * data.top))
        : b === 0 ? "no route" : `${show(+(2 ** ((b - 128) / 25.4)).toPrecision(2))} × the even share`;
      const when = frames.length > 1 ? `${data.names[f]}: ` : "";
      out.textContent = `${when}${data.row} ${data.rows[r]}, ${data.column} ${data.columns[c]}: ${said}`;
    });
    for (const control of [pick, view]) if (control) control.addEventListener("input", draw);
    heats.push(draw);
    draw();
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => heats.forEach((draw) => draw()));

  // ---------------------------------------------------------------- curves: the values at the step pointed at
  for (const plot of document.querySelectorAll(".plot")) {
    const [x0, x1] = plot.dataset.x.split(",").map(Number), [y0, y1] = plot.dataset.y.split(",").map(Number);
    const log = plot.dataset.log === "1", names = plot.dataset.names ? JSON.parse(plot.dataset.names) : null;
    const back = (v) => { const t = 1 - v / 300; return log ? y0 * (y1 / y0) ** t : y0 + t * (y1 - y0); };
    const series = [...plot.querySelectorAll(".curve")].map((path) => ({
      name: path.dataset.name,
      points: [...path.getAttribute("d").matchAll(/[ML]([-\d.]+) ([-\d.]+)/g)].map((m) => [+m[1], +m[2]]),
    }));
    let hair = null, tip = null;
    const leave = () => { if (hair) { hair.remove(); tip.remove(); hair = tip = null; } };
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * 1000;
      let nearest = null;
      for (const s of series) for (const p of s.points) if (nearest === null || Math.abs(p[0] - at) < Math.abs(nearest - at)) nearest = p[0];
      if (nearest === null) return;
      if (!hair) {
        hair = plot.appendChild(document.createElement("div")); hair.className = "hair";
        tip = plot.appendChild(document.createElement("div")); tip.className = "tip";
      }
      const x = x0 + (nearest / 1000) * (x1 - x0);
      const lines = [names ? names[Math.round(x)] : String(Math.round(x))];
      for (const s of series) {
        const point = s.points.find((p) => p[0] === nearest);
        if (point) lines.push(`${s.name}: ${show(back(point[1]))}`);
      }
      hair.style.left = nearest / 10 + "%";
      tip.textContent = lines.join("\n");
      tip.style.left = nearest < 500 ? `calc(${nearest / 10}% + 8px)` : "auto";
      tip.style.right = nearest < 500 ? "auto" : `calc(${100 - nearest / 10}% + 8px)`;
    });
    plot.addEventListener("pointerleave", leave);
  }
})();
