// The R-LoRA layer to play with: controls, a diagram and what follows from the settings. It takes
// the place of the static picture of the page. The symbols are those of the book; the counts are
// those of rlora_min, and a test holds them to it. The settings stand in the page's address.
"use strict";
{
  const CONTROLS = [
    // [key, words, symbol, type, lowest, highest, step, start]
    ["N", "heads", "<var>N</var>", "range", 1, 16, 1, 3],
    ["r", "rank", "<var>r</var>", "range", 1, 64, 1, 4],
    ["p", "dropout", "<var>p</var>", "range", 0, 0.9, 0.05, 0.1],
    ["d_in", "inputs", "<var>d</var><sub>in</sub>", "number", 1, 65536, 1, 896],
    ["d_out", "outputs", "<var>d</var><sub>out</sub>", "number", 1, 65536, 1, 4864],
    ["alpha", "constant", "<var>α</var>", "number", 0.01, 4096, "any", 32],
    ["gamma", "random scale", "<var>γ</var>", "number", 0.01, 4096, "any", 64],
  ];
  // The wide projection of an MLP in Qwen2.5, by the size of the model.
  const PRESETS = { "0.5B": { d_in: 896, d_out: 4864 }, "7B": { d_in: 3584, d_out: 18944 } };
  const SHOWN = 6; // rows of heads in the diagram

  const integer = (n) => n.toLocaleString("en-US");
  const number = (n) => (n === 0 ? "0" : String(Number(n.toPrecision(3))));

  // Everything that the page says, from the settings.
  function count({ N, r, p, d_in, d_out, alpha, gamma }) {
    const A = r * d_in;
    const heads = N * r * d_out;
    const router = N * d_in;
    const trained = A + heads + router;
    const kept = d_in + 3 * N + 3 * r + N * r * (p > 0 ? 2 : 1);
    return {
      A,
      heads,
      router,
      trained,
      share: trained / (d_in * d_out),
      pair: r * (d_in + d_out),
      lora: trained / (d_in + d_out),
      kept,
      once: (2 * r + N) * d_in + (N + 1) * r * d_out,
      s: alpha / Math.sqrt(r),
      start: alpha / gamma,
      gradients: 1 - p,
      spread: 1 / Math.sqrt(d_out * r),
    };
  }

  // [key of the output, what it is, its text]
  const ROWS = [
    ["A", "trained: <var>A</var>", (c) => integer(c.A)],
    ["heads", "trained: all heads", (c) => integer(c.heads)],
    ["router", "trained: router", (c) => integer(c.router)],
    ["trained", "trained, together", (c) => integer(c.trained)],
    ["share", "share of <var>W</var><sub>0</sub>’s numbers", (c) => `${number(100 * c.share)} %`],
    ["lora", "rank of a LoRA of this size", (c) => c.lora.toFixed(2)],
    ["pair", "frozen: the side pair", (c) => integer(c.pair)],
    ["kept", "kept for the backward, a token", (c) => `${integer(c.kept)} numbers`],
    ["bytes", "the same, in fp32", (c) => `${integer(4 * c.kept)} bytes`],
    ["once", "kept once a layer", (c) => `${integer(c.once)} numbers`],
    ["s", "scale <var>s</var>", (c) => number(c.s)],
    ["start", "size of a head’s output at the start", (c) => number(c.start)],
    [
      "gradients",
      "cosine of two heads’ gradients, unrelated tokens",
      (c, { N }) => (N > 1 ? number(c.gradients) : "one head only"),
    ],
    [
      "cosine",
      "cosine of two heads at the start",
      (c, { N }) => (N > 1 ? `0 ± ${number(c.spread)}` : "one head only"),
    ],
  ];

  // Reproducible masks: the same draw for the same settings, until new ones are asked for.
  function* uniform(seed) {
    for (let state = seed >>> 0; ; ) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      yield state / 2 ** 32;
    }
  }

  const text = (x, y, words, extra = "") => `<text x="${x}" y="${y}" ${extra}>${words}</text>`;
  const symbol = (letter, low = "") =>
    `<tspan class="symbol">${letter}</tspan>` +
    (low && `<tspan class="index" dy="3">${low}</tspan><tspan dy="-3">&#8203;</tspan>`);
  const line = (...points) => `<polyline points="${points.join(" ")}" class="flow"/>`;
  const box = (look, ...points) => `<polygon points="${points.join(" ")}" class="${look}"/>`;
  const size = (n, most) => (most * (3 + Math.log2(n + 1))) / (3 + Math.log2(65537)); // of an edge
  // A matrix whose edges are as long as what goes in and what comes out: downward, or to the right.
  const down = (look, x, y, top, bottom, height) =>
    box(look, x - top / 2, y, x + top / 2, y, x + bottom / 2, y + height, x - bottom / 2, y + height);
  const right = (look, x, y, from, to, width) =>
    box(look, x, y - from / 2, x + width, y - to / 2, x + width, y + to / 2, x, y + from / 2);

  function diagram({ N, r, p, d_in, d_out }, draw) {
    const rows = N > SHOWN ? SHOWN - 1 : N;
    const cells = Math.min(r, 8);
    const random = uniform(2024 + 7919 * draw);
    const first = 122; // the middle of the first head's row
    const side = first + 28 * (rows + (N > rows ? 1 : 0)); // that of the side pair
    const end = side + 40;
    const [w, h] = [size(d_in, 80), size(d_out, side - 76)]; // of W0
    const wMiddle = (40 + side + 14) / 2;
    const parts = [
      box("plain", 6, 4, 394, 4, 394, 28, 6, 28),
      text(200, 21, `${symbol("x")}: ${integer(d_in)} numbers`),
      line(44, 28, 44, wMiddle - h / 2),
      box("frozen", 44 - w / 2, wMiddle - h / 2, 44 + w / 2, wMiddle - h / 2,
        44 + w / 2, wMiddle + h / 2, 44 - w / 2, wMiddle + h / 2),
      text(44, wMiddle - 14, symbol("W", "0")),
      text(44, wMiddle + 4, `${integer(d_out)} ×`),
      text(44, wMiddle + 20, integer(d_in)),
      line(44, wMiddle + h / 2, 44, end),
      line(160, 28, 160, 46),
      down("trained", 160, 46, size(d_in, 130), size(r, 130), 30),
      text(160, 66, `${symbol("A")}: ${r} × ${integer(d_in)}`),
      line(160, 76, 160, 92, 98, 92, 98, first + 28 * (rows - 1)),
      text(196, 102, "masks", 'class="end"'),
      line(316, 28, 316, 46),
      down("router", 316, 46, size(d_in, 150), size(N, 150), 30),
      text(316, 66, `${symbol("W", "r")}: ${N} × ${integer(d_in)}`),
      line(316, 76, 316, 92, 282, 92, 282, first + 28 * (rows - 1)),
      text(322, 102, "weights", 'class="start"'),
      line(384, first, 384, end),
    ];
    for (let i = 0; i < rows; i += 1) {
      const y = first + 28 * i;
      for (let k = 0; k < cells; k += 1) {
        const dropped = random.next().value < p;
        const x = 104 + 11 * k;
        parts.push(`<rect x="${x}" y="${y - 6}" width="9" height="12" class="cell"/>`);
        if (dropped) {
          const [a, b, c, d] = [x + 1, y - 5, x + 8, y + 5];
          parts.push(`<path d="M${a} ${b}L${c} ${d}M${a} ${d}L${c} ${b}" class="cross"/>`);
        }
      }
      if (r > cells) parts.push(text(197, y + 4, "…"));
      parts.push(
        line(98, y, 104, y),
        line(r > cells ? 203 : 102 + 11 * cells, y, 208, y),
        right("random", 208, y, size(r, 30), size(d_out, 30), 44),
        text(230, y + 5, symbol("B", i + 1)),
        line(252, y, 384, y),
        `<rect x="264" y="${y - 7}" width="36" height="14" class="plain ground"/>`,
        `<rect x="264" y="${y - 7}" width="${Math.max(2, 36 / N)}" height="14" class="router"/>`,
        `<rect x="304" y="${y - 8}" width="34" height="16" class="ground"/>`,
        text(321, y + 4, `1/${N}`),
      );
    }
    if (N > rows) parts.push(text(240, side - 24, `… and ${N - rows} more heads`));
    parts.push(
      line(90, 28, 90, side, 112, side),
      right("frozen", 112, side, size(d_in, 30), size(r, 30), 44),
      text(134, side + 5, symbol("A", "0")),
      line(156, side, 208, side),
      right("frozen", 208, side, size(r, 30), size(d_out, 30), 44),
      text(230, side + 5, symbol("B̄", "0")),
      line(252, side, 384, side),
      `<rect x="262" y="${side - 8}" width="112" height="16" class="ground"/>`,
      text(318, side + 4, "− frozen, taken off"),
      box("plain", 6, end, 394, end, 394, end + 24, 6, end + 24),
      text(200, end + 17, `${symbol("h")}: ${integer(d_out)} numbers`),
    );
    const label =
      `Diagram of the layer: ${integer(d_in)} inputs go to the frozen W0, to A of rank ${r} and ` +
      `to the router. Each of ${N} heads masks the ${r} numbers of A x with dropout ${p}, and ` +
      `writes ${integer(d_out)} outputs, weighted by the router. The frozen side pair is ` +
      "subtracted, and everything is added up.";
    return picture(end + 28, label, parts);
  }

  const picture = (height, label, parts) =>
    `<svg viewBox="0 0 400 ${height}" role="img" aria-label="${label}">${parts.join("")}</svg>`;

  // What is trained, as bars: R-LoRA, a LoRA of its size, and one of its rank.
  function bars({ r, d_in, d_out }, counts) {
    const one = r * (d_in + d_out);
    const equal = counts.lora.toFixed(2);
    const lines = [
      ["R-LoRA", [["trained", counts.A], ["random", counts.heads], ["router", counts.router]]],
      [`LoRA of its size, rank ${equal}`,
        [["trained", counts.lora * d_in], ["random", counts.lora * d_out]]],
      [`LoRA of its rank, ${r}`, [["trained", r * d_in], ["random", r * d_out]]],
    ];
    const most = Math.max(counts.trained, one);
    const parts = lines.flatMap(([name, pieces], i) => {
      const y = 18 + 38 * i;
      let x = 0;
      const total = pieces.reduce((sum, [, n]) => sum + n, 0);
      const drawn = pieces.map(([look, n]) => {
        const width = (400 * n) / most;
        x += width;
        return `<rect x="${x - width}" y="${y}" width="${width}" height="14" class="${look}"/>`;
      });
      const words = text(0, y - 5, name, 'class="start"');
      return [words, text(400, y - 5, integer(Math.round(total)), 'class="end"'), ...drawn];
    });
    parts.push(text(0, 132, "blue: A, orange: heads or B, green: router", 'class="start"'));
    const label =
      `Bars of the trained numbers: R-LoRA ${integer(counts.trained)}, a LoRA of rank ${equal} as ` +
      `many, a LoRA of rank ${r} ${integer(one)}.`;
    return picture(136, label, parts);
  }

  function build(place) {
    const root = document.createElement("div");
    root.id = "playground";
    const control = ([key, words, sign, type, min, max, step, value]) => `
      <p class="control"><label for="set-${key}">${words} ${sign}</label>
      <input id="set-${key}" type="${type}" min="${min}" max="${max}" step="${step}"
        value="${value}" required aria-describedby="playground-error">
      ${type === "range" ? `<output for="set-${key}" id="is-${key}" aria-live="off"></output>` : ""}</p>`;
    const preset = (name) => `<button type="button" data-preset="${name}">${name} model</button>`;
    const row = ([key, label]) => `
      <tr><th scope="row">${label}</th><td><output id="out-${key}" aria-live="off"></output></td></tr>`;
    root.innerHTML = `
      <form aria-label="Settings of the layer">${CONTROLS.map(control).join("")}
        <p class="control">${Object.keys(PRESETS).map(preset).join(" ")}</p>
        <p class="control"><button type="button" id="redraw">Draw new masks</button>
        <button type="reset">Start again</button></p></form>
      <p id="playground-error" role="alert"></p>
      <div class="result"><div><div class="drawing"></div><div class="bars"></div></div>
        <table class="table"><caption>What follows from the settings</caption>
          <tbody>${ROWS.map(row).join("")}</tbody></table></div>
      <p id="playground-status" role="status"></p>`;
    place.replaceWith(root);

    const form = root.querySelector("form");
    const find = (id) => root.querySelector(`#${id}`);
    let draw = 0;
    let speak = 0;

    // The settings that differ from the start stand in the address, so that a link leads to them.
    function keep(settings) {
      const changed = CONTROLS.filter(([key, , , , , , , start]) => settings[key] !== start);
      const query = changed.map(([key]) => `${key}=${settings[key]}`).join("&");
      history.replaceState(null, "", query ? `?${query}` : location.pathname);
    }

    function update() {
      const error = find("playground-error");
      const settings = {};
      error.textContent = "";
      for (const [key, words, , type, min, max, step] of CONTROLS) {
        const input = find(`set-${key}`);
        const good = input.validity.valid;
        input.setAttribute("aria-invalid", String(!good));
        if (!good) {
          const kind = step === 1 ? "a whole number" : "a number";
          error.textContent =
            `${words} ${key} must be ${kind} from ${integer(min)} to ${integer(max)}.`;
        }
        settings[key] = input.valueAsNumber;
        if (type === "range") find(`is-${key}`).textContent = number(input.valueAsNumber);
      }
      if (error.textContent) return; // what is shown is that of the last settings that were good
      const counts = count(settings);
      for (const [key, , words] of ROWS) find(`out-${key}`).textContent = words(counts, settings);
      root.querySelector(".drawing").innerHTML = diagram(settings, draw);
      root.querySelector(".bars").innerHTML = bars(settings, counts);
      keep(settings);
      clearTimeout(speak); // a screen reader hears one sentence, once the knob rests
      speak = setTimeout(() => {
        const heads = settings.N > 1 ? `${settings.N} heads` : "One head";
        find("playground-status").textContent =
          `${heads} of rank ${settings.r}: ${integer(counts.trained)} trained numbers, as many as ` +
          `a LoRA of rank ${counts.lora.toFixed(2)}. Kept for the backward: ` +
          `${integer(4 * counts.kept)} bytes a token.`;
      }, 400);
    }

    form.addEventListener("input", update);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(update));
    form.addEventListener("click", ({ target }) => {
      const chosen = PRESETS[target.dataset.preset];
      if (!chosen) return;
      for (const [key, value] of Object.entries(chosen)) find(`set-${key}`).value = value;
      update();
    });
    find("redraw").addEventListener("click", () => {
      draw += 1;
      update();
    });
    for (const [key, value] of new URLSearchParams(location.search)) {
      const input = find(`set-${CSS.escape(key)}`);
      if (input) input.value = value;
    }
    update();
  }

  build(document.querySelector('.bd-article img[src*="rlora_layer"]').closest("p, figure"));
}
