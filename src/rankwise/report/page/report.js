"use strict";
(async () => {
  if (typeof DecompressionStream === "undefined") {
    document.getElementById("old").hidden = false;
    return;
  }

  /** Unpacks the text of an element, which is gzip in base64. */
  function unpacked(id) {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (each) => each.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  const { figures, frames } = JSON.parse(await unpacked("data"));
  const library = document.createElement("script");
  library.textContent = await unpacked("plotly");
  document.head.append(library);
  for (const frame of frames) {
    frame.ranks = [frame.first];
    for (const changes of frame.changes) {
      const ranks = frame.ranks.at(-1).slice();
      for (let i = 0; i < changes.length; i += 2) ranks[changes[i]] = changes[i + 1];
      frame.ranks.push(ranks);
    }
  }
  const steps = [...new Set(frames.flatMap((frame) => frame.steps))].sort((a, b) => a - b);
  const charts = [...document.querySelectorAll(".chart")];
  const coarse = matchMedia("(pointer: coarse)").matches; // fingers scroll the page, they don't zoom charts
  const options = { displayModeBar: false, responsive: true, scrollZoom: false };

  /** The page's current colours: light, dark or print. */
  function colours() {
    const style = getComputedStyle(document.documentElement);
    return (name) => style.getPropertyValue(`--${name}`).trim();
  }

  function layoutOf(figure) {
    const colour = colours();
    const axis = { gridcolor: colour("grid"), linecolor: colour("line"), tickcolor: colour("line") };
    return {
      ...figure.layout,
      autosize: true,
      dragmode: coarse ? false : "zoom",
      template: {
        layout: {
          paper_bgcolor: "rgba(0,0,0,0)",
          plot_bgcolor: "rgba(0,0,0,0)",
          font: { color: colour("ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
          hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") } },
          xaxis: axis,
          yaxis: axis,
        },
      },
    };
  }

  /** Splits a heat map's cells by the text colour that can be read on them: rank 0, dark colours, light colours. */
  function byInk(trace, z) {
    const inks = [(rank) => rank === 0, (rank) => rank > 0 && rank <= trace.meta.white, (rank) => rank > trace.meta.white];
    return inks.map((has) => z.map((row) => row.map((rank) => (rank !== null && has(rank) ? rank : null))));
  }

  /** Gives rank 0 the page's own grey, and splits each heat map into one for each text colour. */
  function dataOf(figure) {
    const colour = colours();
    return figure.data.flatMap((trace) => {
      if (!trace.meta) return [trace];
      const colorscale = trace.colorscale.map(([at, c], i) => [at, i < 2 ? colour("empty") : c]);
      const inks = [colour("ink"), "#ffffff", "#000000"];
      return byInk(trace, trace.z).map((z, i) => ({
        ...trace, z, colorscale, showscale: trace.showscale && i === 0, textfont: { color: inks[i] },
      }));
    });
  }

  function draw() {
    for (const chart of charts) {
      const figure = figures[chart.id];
      Plotly.react(chart, dataOf(figure), layoutOf(figure), options);
    }
  }

  /** The index of a run's last record up to a step; 0 before its first record. */
  function recordAt(frame, step) {
    let at = 0;
    while (at + 1 < frame.steps.length && frame.steps[at + 1] <= step) at++;
    return at;
  }

  function show(position) {
    const step = steps[position];
    document.getElementById("where").textContent = step.toLocaleString("en");
    document.getElementById("step").setAttribute("aria-valuetext", `step ${step}`);
    frames.forEach((frame, run) => {
      const at = recordAt(frame, step);
      const ranks = frame.ranks[at];
      const left = ranks.reduce((sum, rank) => sum + rank, 0).toLocaleString("en");
      document.querySelector(`.at[data-run="${run}"]`).textContent =
        frame.steps.length > 1 ? `${left} ranks, budget ${frame.budgets[at].toLocaleString("en")}` : `${left} ranks`;
      for (const [id, cells] of Object.entries(frame.cells)) {
        const trace = figures[id].data[0];
        trace.z = cells.map((row) => row.map((cell) => (cell < 0 ? null : ranks[cell])));
        Plotly.restyle(id, { z: byInk(trace, trace.z) }, [0, 1, 2]);
      }
    });
  }

  draw();
  const slider = document.getElementById("step");
  if (slider) {
    const play = document.getElementById("play");
    let timer = null;
    const stop = () => {
      clearInterval(timer);
      timer = null;
      play.textContent = "▶";
      play.setAttribute("aria-label", "Play the steps");
    };
    const go = (position) => {
      slider.value = position;
      show(position);
    };
    slider.addEventListener("input", () => {
      stop();
      show(Number(slider.value));
    });
    play.addEventListener("click", () => {
      if (timer !== null) return stop();
      const last = steps.length - 1;
      const stride = Math.max(1, Math.round(steps.length / 60));
      if (Number(slider.value) >= last) go(0);
      play.textContent = "❚❚";
      play.setAttribute("aria-label", "Stop");
      timer = setInterval(() => {
        go(Math.min(last, Number(slider.value) + stride));
        if (Number(slider.value) >= last) stop();
      }, 120);
    });
    show(steps.length - 1);
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  const printed = matchMedia("print");
  printed.addEventListener("change", draw);
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const each of opened) each.open = true;
    for (const chart of charts) Plotly.Plots.resize(chart);
  });
  addEventListener("afterprint", () => {
    for (const each of opened) each.open = false;
  });
})();
