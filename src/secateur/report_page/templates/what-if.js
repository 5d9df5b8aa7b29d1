// The what-if page: sliders vary the question, and advisor.js answers it.
for (const root of document.querySelectorAll("[data-what-if]")) {
  const data = JSON.parse(root.dataset.whatIf), { need } = data.question;
  const price = (name) => (name === data.hardware
    ? data.question.hardware : data.question.facts.hardware[name]).usd_per_hour;
  const beginning = () => ({
    ...need.load, quality_loss: need.quality_loss, hardware: data.hardware, plan: "",
    usd_per_hour: price(data.hardware)[1], devices: null,
  });
  let state = beginning();
  const slot = (name) => root.querySelector(`[data-slot="${name}"]`);
  const make = (tag, text = "", kind = "") => {
    const element = document.createElement(tag);
    element.textContent = text;
    if (kind) element.className = kind;
    return element;
  };

  // numbers for people
  const number = (x, digits = 3) => x >= 1000
    ? Math.round(x).toLocaleString("en") : String(Number(x.toPrecision(digits)));
  const usd = (x) => x >= 1000 || x < 1 || Number.isInteger(x) ? `$${number(x)}` : `$${x.toFixed(2)}`;
  const about = (x) => number(Number(x.toPrecision(3)));
  const short = (x) => x >= 1e6 ? `${x / 1e6} M` : x >= 1000 ? `${x / 1000} k` : String(x);
  const ranged = ([low, typical, high], form) => low === high
    ? form(typical) : `${form(typical)} (${form(low)} to ${form(high)})`;
  const percent = (x) => `${Number((100 * x).toFixed(1))} %`;
  const kept = ([low, high]) =>
    low === high ? percent(low) : `${percent(low).replace(" %", "")}–${percent(high)}`;
  const gib = (bytes) => `${(bytes / data.constants.gib).toFixed(1)} GiB`;

  // sliders: positions are even steps, of the value or of its logarithm
  const STEPS = 400;
  const rangeOf = (input) => ({
    low: Number(input.dataset.low), high: Number(input.dataset.high),
    log: input.dataset.scale === "log", whole: input.dataset.whole === "true",
  });
  const valueOf = (input) => {
    const { low, high, log, whole } = rangeOf(input), at = Number(input.value) / STEPS;
    if (input.dataset.any && Number(input.value) === Number(input.dataset.any)) return null;
    const value = log ? low * (high / low) ** at : low + (high - low) * at;
    const short = Number(value.toPrecision(log ? 2 : 3));
    return whole ? Math.round(short) : short;
  };
  const positionOf = (input, value) => {
    const { low, high, log } = rangeOf(input);
    if (value === null) return Number(input.dataset.any);
    const at = log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
    return Math.min(STEPS, Math.max(0, Math.round(at * STEPS)));
  };
  const said = {
    usd_per_hour: usd, utilisation: percent, quality_loss: percent,
    peak: (x) => `${x} ×`, token_ms: (x) => `${number(x)} ms`,
  };
  const sliders = [...root.querySelectorAll("input[type=range]")];
  const showSlider = (input) => {
    const value = state[input.name];
    const text = value === null ? input.dataset.anyText : (said[input.name] ?? number)(value);
    input.parentElement.querySelector("output").textContent = text;
    input.setAttribute("aria-valuetext", text);
  };
  const place = () => {
    for (const input of sliders) {
      input.value = positionOf(input, state[input.name]);
      showSlider(input);
    }
    slot("hardware").value = state.hardware;
  };

  const prices = () => {
    const own = price(state.hardware);
    return state.usd_per_hour === own[1] ? own : Array(3).fill(state.usd_per_hour);
  };
  const needNow = () => ({
    load: Object.fromEntries(Object.keys(need.load).map((name) => [name, state[name]])),
    quality_loss: state.quality_loss, gpu_hours: need.gpu_hours,
  });

  const tile = (title, value, note) => {
    const box = make("div", "", "claim");
    box.append(make("dt", title), make("dd"));
    box.lastChild.append(make("div", value, "value"), make("p", note));
    return box;
  };
  const tiles = (row, load) => {
    if (!row?.cost) {
      return [tile("Cannot serve", "—", row ? row.refused : "No option keeps the bounds.")];
    }
    const { found, cost } = row, most = advisor.mostRequests(found.least_busy[1], load);
    const needed = found.devices[1], have = state.devices ?? needed;
    const serves = most * Math.floor(have / found.shared_by);
    const fit = `${number(have)} can serve ${about(serves)} requests a day`;
    const enough = serves >= load.requests_per_day ? "" : `; not enough, ${number(needed)} are needed`;
    return [
      tile("A month", usd(cost.month[1]),
        `${usd(cost.month[0])} to ${usd(cost.month[2])}; a year ${usd(cost.year[1])}`),
      tile("Devices", number(needed),
        `${number(found.devices[0])} to ${number(found.devices[2])}; ${fit}${enough}`),
      tile("A million tokens", usd(cost.million_tokens[1]), "prompt and answer together"),
      tile("Between two tokens", `${number(1e3 * found.step[1])} ms`,
        `99 of 100 within ${ranged(found.p99.map((s) => 1e3 * s), number)} ms; first token after `
        + `${number(1e3 * found.first_token[1])} ms; batch ${found.batch}; a whole request ${
          number(found.first_token[1] + load.new_tokens * found.step[1], 2)} s`),
      tile("Memory of a copy", gib(found.memory.total),
        `weights ${gib(found.memory.weights)}, keys and values ${gib(found.memory.cache)}`
        + (found.shared_by > 1 ? `; ${found.shared_by} devices share it` : "")),
      tile("Accuracy kept", kept(row.option.kept), row.safe
        ? "published for other models; the lowest keeps the bound" : "may break the bound: measure it"),
    ];
  };

  const table = (columns, rows) => {
    const whole = make("table", "", columns.length < 5 ? "stack few" : "stack"), head = make("tr"), body = make("tbody");
    columns.forEach((name) => head.append(make("th", name)));
    for (const { cells, kind = "", pick = null } of rows) {
      const line = make("tr", "", kind);
      cells.forEach((cell, i) => {
        line.append(make("td", cell));
        line.lastChild.dataset.of = columns[i];
      });
      if (pick !== null) {
        const button = make("button", cells[0], "pick");
        button.type = "button";
        button.addEventListener("click", () => { state.plan = pick; show(); });
        line.firstChild.replaceChildren(button);
      }
      body.append(line);
    }
    whole.append(make("thead"), body);
    whole.firstChild.append(head);
    return whole;
  };
  const optionRow = (row, chosen, plan) => ({
    pick: row.option.name,
    kind: [row === plan ? "picked" : "", row === chosen ? "chosen" : "", row.refused ? "out" : ""].join(" "),
    cells: row.cost ? [
      row.option.name, kept(row.option.kept), gib(row.found.memory.total),
      number(row.found.devices[1]), number(1e3 * row.found.step[1]), usd(row.cost.month[1]),
      row.refused ? "out: loss or hours" : row === chosen ? "advised" : row.safe ? "" : "measure first",
    ] : [row.option.name, kept(row.option.kept), "", "", "", "", "cannot serve"],
  });

  // the month's cost against requests per day, both logarithmic
  const svg = (tag, given, text = "") => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    Object.entries(given).forEach(([name, value]) => element.setAttribute(name, value));
    element.textContent = text;
    return element;
  };
  const drawing = (answer, plan, device, load) => {
    const days = Array.from({ length: 61 }, (_, i) => 10 ** (2 + i / 10));
    const own = (row) => days.map((day) => advisor.consider(
      data, row.option, device, { ...needNow(), load: { ...load, requests_per_day: day } }, prices(),
    ).cost?.month[1]);
    const lines = [];
    if (plan?.cost) lines.push({ name: plan.option.name, points: own(plan) });
    if (answer.base.cost && answer.base !== plan) {
      lines.push({ name: answer.base.option.name, points: own(answer.base) });
    }
    for (const api of advisor.apisOf(data, plan ?? answer.base, load, prices())) {
      const each = api.month / load.requests_per_day;
      lines.push({ name: api.name, points: days.map((day) => each * day) });
    }
    const all = lines.flatMap((line) => line.points).filter((y) => y > 0);
    if (!all.length) return [];
    const width = Math.max(300, slot("drawing").clientWidth), height = width < 480 ? 260 : 312;
    const box = { left: 46, right: width - 16, top: 14, bottom: height - 46 };
    const low = Math.floor(Math.log10(Math.max(Math.min(...all), 0.1)));
    const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...all))));
    const x = (day) => box.left + (Math.log10(day) - 2) / 6 * (box.right - box.left);
    const y = (month) => box.bottom
      - (Math.log10(month) - low) / (high - low) * (box.bottom - box.top);
    const image = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
    image.setAttribute("aria-label", "Cost of a month against requests per day");
    for (let power = low; power <= high; power += 1) {
      image.append(
        svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y(10 ** power), y2: y(10 ** power) }),
        svg("text", { x: box.left - 6, y: y(10 ** power) + 4, "text-anchor": "end" }, `$${short(10 ** power)}`));
    }
    for (let power = 2; power <= 8; power += width < 480 ? 2 : 1) {
      image.append(svg("text", { x: x(10 ** power), y: box.bottom + 17, "text-anchor": "middle" },
        short(10 ** power)));
    }
    image.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
      svg("text", { x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, "requests a day"));
    if (load.requests_per_day >= 100 && load.requests_per_day <= 1e8) {
      const at = x(load.requests_per_day);
      image.append(svg("line", { class: "reference", x1: at, x2: at, y1: box.top, y2: box.bottom }));
    }
    lines.forEach((line, i) => {
      const path = days.map((day, k) => [day, line.points[k]]).filter(([, month]) => month >= 10 ** low)
        .map(([day, month], k) => `${k ? "L" : "M"}${x(day).toFixed(1)} ${y(month).toFixed(1)}`).join("");
      image.append(svg("path", { class: `line s${i % 6}`, d: path }));
    });
    const legend = make("ul", "", "legend");
    lines.forEach((line, i) => {
      const entry = make("li", line.name, `s${i % 6}`), key = svg("svg", { viewBox: "-17 -7 34 14" });
      key.append(svg("path", { class: "line", d: "M-17 0H17" }));
      entry.prepend(key);
      legend.append(entry);
    });
    return [image, legend];
  };

  const show = () => {
    const device = advisor.deviceOf(data, state.hardware), now = needNow();
    const answer = advisor.adviseOn(data, device, now, prices());
    const wanted = answer.rows.find((row) => row.option.name === state.plan);
    const plan = wanted ?? answer.chosen ?? answer.cheaper[0] ?? null;
    slot("verdict").textContent = answer.verdict;
    slot("verdict").hidden = answer.verdict === data.verdict;  // it stands at the head of the page
    slot("plan").replaceChildren(...["", ...answer.rows.map((row) => row.option.name)].map((name) => {
      const entry = make("option", name || "what is advised");
      entry.value = name;
      return entry;
    }));
    slot("plan").value = wanted ? state.plan : "";
    slot("of").textContent = plan ? plan.option.name : "no option";
    slot("tiles").replaceChildren(...tiles(plan, now.load));
    const lines = plan ? advisor.commands(plan.option, data.name) : [];
    const months = plan?.cost && answer.base.cost
      ? advisor.breakEven(plan.making, answer.base.cost, plan.cost) : null;
    slot("recipe").replaceChildren(...lines.map((line) => make("code", line, "command")));
    slot("making").textContent = !plan?.making.gpu_hours[1] ? "" : "To make it: about "
      + `${ranged(plan.making.gpu_hours, number)} GPU hours, ${ranged(plan.making.usd, usd)}`
      + (months === null ? "." : `; paid back after ${number(months, 2)} months.`);
    slot("drawing").replaceChildren(...drawing(answer, plan, device, now.load));
    const columns = ["option", "accuracy", "memory", "devices", "ms/token", "a month", ""];
    const tableOf = (rows) => rows.length
      ? [table(columns, rows.map((row) => optionRow(row, answer.chosen, plan)))] : [];
    const out = answer.rows.filter((row) => row.refused);
    slot("options").replaceChildren(...tableOf(answer.rows.filter((row) => !row.refused)));
    slot("out").hidden = !out.length;
    slot("out").firstChild.textContent = `${out.length} options that are out`;
    slot("out").lastChild.replaceChildren(...tableOf(out));
    const median = ({ first_token_seconds: first, tokens_per_second: rate }) =>
      first === null || rate === null ? "not known" : `${number(first + now.load.new_tokens / rate, 2)} s`;
    const hosted = advisor.apisOf(data, plan, now.load, prices()).map((api) => ({
      cells: [api.name, usd(api.month), median(data.question.facts.apis[api.name]),
        api.requests_per_day === null ? "never" : `${number(api.requests_per_day)} requests a day`],
    }));
    const columnsOfHosted = ["hosted model", "a month", "a request (P50)", "serving is cheaper from"];
    slot("hosted").replaceChildren(...hosted.length ? [table(columnsOfHosted, hosted)] : []);
  };

  for (const input of sliders) {
    input.addEventListener("input", () => {
      state[input.name] = valueOf(input);
      showSlider(input);
      show();
    });
  }
  slot("hardware").addEventListener("change", (event) => {
    state.hardware = event.target.value;
    state.usd_per_hour = price(state.hardware)[1];
    place();
    show();
  });
  slot("plan").addEventListener("change", (event) => { state.plan = event.target.value; show(); });
  slot("reset").addEventListener("click", () => { state = beginning(); place(); show(); });
  place();
  show();
}
