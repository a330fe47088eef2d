// The R-LoRA layer to play with: controls, a diagram and what follows from the settings. It takes
// the place of the static picture of the page. The symbols are those of the book; the counts are
// those of rlora_min, and a test holds them to it.
"use strict";
{
  const CONTROLS = [
    // [key, label, type, lowest, highest, step, start]
    ["N", "heads N", "range", 1, 16, 1, 3],
    ["r", "rank r", "range", 1, 64, 1, 4],
    ["p", "dropout p", "range", 0, 0.9, 0.05, 0.1],
    ["d_in", "inputs d_in", "number", 1, 65536, 1, 896],
    ["d_out", "outputs d_out", "number", 1, 65536, 1, 4864],
    ["alpha", "alpha", "number", 0.01, 4096, "any", 32],
    ["gamma", "gamma", "number", 0.01, 4096, "any", 64],
  ];
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
    ["A", "trained: A", (c) => integer(c.A)],
    ["heads", "trained: all heads", (c) => integer(c.heads)],
    ["router", "trained: router", (c) => integer(c.router)],
    ["trained", "trained, together", (c) => integer(c.trained)],
    ["share", "share of W₀’s numbers", (c) => `${number(100 * c.share)} %`],
    ["lora", "rank of a LoRA of this size", (c) => c.lora.toFixed(2)],
    ["pair", "frozen: the side pair", (c) => integer(c.pair)],
    ["kept", "kept for the backward, a token", (c) => `${integer(c.kept)} numbers`],
    ["bytes", "the same, in fp32", (c) => `${integer(4 * c.kept)} bytes`],
    ["once", "kept once a layer", (c) => `${integer(c.once)} numbers`],
    ["s", "scale s", (c) => number(c.s)],
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

  function diagram({ N, r, p, d_in, d_out }, draw) {
    const rows = N > SHOWN ? SHOWN - 1 : N;
    const cells = Math.min(r, 8);
    const random = uniform(2024 + 7919 * draw);
    const low = 128 + 28 * (rows + (N > rows ? 1 : 0)); // where the rows of heads end
    const text = (x, y, words, extra = "") => `<text x="${x}" y="${y}" ${extra}>${words}</text>`;
    const line = (...points) => `<polyline points="${points.join(" ")}" class="flow"/>`;
    const box = (look, ...points) => `<polygon points="${points.join(" ")}" class="${look}"/>`;
    const parts = [
      box("plain", 6, 4, 394, 4, 394, 28, 6, 28),
      text(200, 21, `x: ${integer(d_in)} numbers`),
      line(46, 28, 46, 46),
      line(164, 28, 164, 46),
      line(324, 28, 324, 46),
      box("frozen", 6, 46, 86, 46, 86, low + 44, 6, low + 44),
      text(46, low / 2 + 30, "W₀"),
      text(46, low / 2 + 48, `${integer(d_out)} ×`),
      text(46, low / 2 + 64, integer(d_in)),
      text(46, low / 2 + 84, "frozen"),
      box("trained", 102, 46, 226, 46, 206, 76, 122, 76),
      text(164, 66, `A: ${r} × ${integer(d_in)}`),
      box("router", 254, 46, 394, 46, 374, 76, 274, 76),
      text(324, 66, `router: ${N} × ${integer(d_in)}`),
      line(164, 76, 164, 86),
      text(164, 100, "masks D on A x"),
      line(324, 76, 324, 86),
      text(324, 100, "weights g, equal at first"),
    ];
    for (let i = 0; i < rows; i += 1) {
      const y = 112 + 28 * i;
      for (let k = 0; k < cells; k += 1) {
        const dropped = random.next().value < p;
        const x = 102 + 11 * k;
        parts.push(`<rect x="${x}" y="${y + 5}" width="9" height="12" class="cell"/>`);
        if (dropped) {
          const [a, b, c, d] = [x + 1, y + 6, x + 8, y + 16];
          parts.push(`<path d="M${a} ${b}L${c} ${d}M${a} ${d}L${c} ${b}" class="cross"/>`);
        }
      }
      if (r > cells) parts.push(text(196, y + 16, "…"));
      parts.push(
        line(r > cells ? 202 : 102 + 11 * cells, y + 11, 206, y + 11),
        line(250, y + 11, 264, y + 11),
        box("random", 206, y + 4, 250, y, 250, y + 22, 206, y + 18),
        text(228, y + 16, `B<tspan class="index" dy="3">${i + 1}</tspan>`),
        `<rect x="264" y="${y + 4}" width="${Math.max(2, 76 / N)}" height="14" class="router"/>`,
        text(394, y + 16, `g = 1/${N}`, 'class="end"'),
      );
    }
    if (N > rows) parts.push(text(240, 130 + 28 * rows, `… and ${N - rows} more heads`));
    parts.push(
      box("frozen", 102, low, 394, low, 394, low + 44, 102, low + 44),
      text(248, low + 18, "frozen, taken off again: mean head × A"),
      text(248, low + 36, `as drawn, ${integer(d_out)} × ${r} and ${r} × ${integer(d_in)}`),
      line(46, low + 44, 46, low + 62),
      line(248, low + 44, 248, low + 62),
      box("plain", 6, low + 62, 394, low + 62, 394, low + 86, 6, low + 86),
      text(200, low + 79, `sum h: ${integer(d_out)} numbers`),
    );
    const label =
      `Diagram of the layer: ${integer(d_in)} inputs go to the frozen W0, to A of rank ${r} and ` +
      `to the router. Each of ${N} heads masks the ${r} numbers of A x with dropout ${p}, and ` +
      `writes ${integer(d_out)} outputs, weighted by the router. The frozen side pair is ` +
      "subtracted, and everything is added up.";
    return `<svg viewBox="0 0 400 ${low + 90}" role="img" aria-label="${label}">${parts.join("")}</svg>`;
  }

  function build(place) {
    const root = document.createElement("div");
    root.id = "playground";
    const control = ([key, label, type, min, max, step, value]) => `
      <p class="control"><label for="set-${key}">${label}</label>
      <input id="set-${key}" type="${type}" min="${min}" max="${max}" step="${step}"
        value="${value}" required aria-describedby="playground-error">
      ${type === "range" ? `<output for="set-${key}" id="is-${key}" aria-live="off"></output>` : ""}</p>`;
    const row = ([key, label]) => `
      <tr><th scope="row">${label}</th><td><output id="out-${key}" aria-live="off"></output></td></tr>`;
    root.innerHTML = `
      <form aria-label="Settings of the layer">${CONTROLS.map(control).join("")}
        <p class="control"><button type="button" id="redraw">Draw new masks</button>
        <button type="reset">Start again</button></p></form>
      <p id="playground-error" role="alert"></p>
      <div class="result"><div class="drawing"></div>
        <table class="table"><caption>What follows from the settings</caption>
          <tbody>${ROWS.map(row).join("")}</tbody></table></div>
      <p id="playground-status" role="status"></p>`;
    place.replaceWith(root);

    const form = root.querySelector("form");
    const find = (id) => root.querySelector(`#${id}`);
    let draw = 0;
    let speak = 0;

    function update() {
      const error = find("playground-error");
      const settings = {};
      error.textContent = "";
      for (const [key, label, type, min, max, step] of CONTROLS) {
        const input = find(`set-${key}`);
        const good = input.validity.valid;
        input.toggleAttribute("aria-invalid", !good);
        if (!good) {
          const kind = step === 1 ? "a whole number" : "a number";
          error.textContent = `${label} must be ${kind} from ${integer(min)} to ${integer(max)}.`;
        }
        settings[key] = input.valueAsNumber;
        if (type === "range") find(`is-${key}`).textContent = number(input.valueAsNumber);
      }
      if (error.textContent) return; // what is shown is that of the last settings that were good
      const counts = count(settings);
      for (const [key, , text] of ROWS) find(`out-${key}`).textContent = text(counts, settings);
      root.querySelector(".drawing").innerHTML = diagram(settings, draw);
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
    find("redraw").addEventListener("click", () => {
      draw += 1;
      update();
    });
    update();
  }

  build(document.querySelector('.bd-article img[src*="rlora_layer"]').closest("p, figure"));
}
