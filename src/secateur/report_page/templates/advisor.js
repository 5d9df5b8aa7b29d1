"use strict";
// The formulas of secateur.advisor, line by line; tests compare every number with Python's.
// A number with a range is [low, typical, high]. Constants and tables come from Python (`data`).
const advisor = (() => {
  const map = (range, f) => {
    const ends = [f(range[0]), f(range[2])];
    return [Math.min(...ends), f(range[1]), Math.max(...ends)];
  };
  const add = (a, b) => a.map((x, i) => x + b[i]);
  const scale = (a, factor) => a.map((x) => x * factor);
  const times = (a, b) => a.map((x, i) => x * b[i]);
  const larger = (a, b) => a.map((x, i) => Math.max(x, b[i]));
  const exact = (x) => [x, x, x];
  const round = (x) => {  // halves to the even neighbour, as Python does
    const low = Math.floor(x), rest = x - low;
    return rest < 0.5 || (rest === 0.5 && low % 2 === 0) ? low : low + 1;
  };

  // shape.py
  const outer = (m) => m.tied ? m.embedding : m.embedding + m.head;
  const parameters = (m) => m.linears + outer(m) + m.other;
  const perToken = (m) => m.active + m.head;
  const seen = (cache, tokens) => cache.window === null ? tokens : Math.min(tokens, cache.window);
  const sum = (m, each) => m.kinds.reduce((all, { layers, cache }) => all + layers * each(cache), 0);
  const cacheBytes = (m, tokens) =>
    sum(m, (cache) => seen(cache, tokens) * cache.values * 2 + cache.state_bytes);
  const heldPositions = ({ tile, chunk_tokens: chunk }, cache, tokens) => tile * Math.min(
    Math.ceil(tokens / tile),
    cache.window ? Math.ceil((cache.window + chunk - 2) / tile) + 1 : Infinity,
  );
  const heldBytes = (c, m, tokens, kind) => kind !== "cpu" ? cacheBytes(m, tokens)
    : sum(m, (cache) => heldPositions(c, cache, tokens) * cache.values * 2 + cache.state_bytes);
  const cacheReadBytes = (m, tokens) =>
    sum(m, (cache) => seen(cache, tokens) * cache.read * 2 + cache.state_bytes);
  const stepOperations = (m, tokens) => 2 * perToken(m)
    + sum(m, (cache) => 2 * seen(cache, tokens) * cache.step_width + cache.state_bytes);
  const promptOperations = (m, tokens) => 2 * (tokens * m.active + m.head) + sum(m, (cache) => {
    const last = seen(cache, tokens), pairs = last * last / 2 + (tokens - last) * last;
    return 2 * pairs * cache.width + tokens * cache.state_bytes;
  });
  const widest = (m) =>
    Math.max(m.hidden, ...m.kinds.map(({ cache }) => Math.floor(cache.width / 2)));
  const scaled = (m, { linears, layers, experts }) => ({
    ...m,
    layers: Math.max(1, round(m.layers * layers)),
    linears: round(
      (m.linears - m.expert_weights + round(m.expert_weights * experts)) * linears * layers),
    active: round(m.active * linears * layers),
    other: round(m.other * layers),
    kinds: m.kinds.map((kind) => {
      const { cache } = kind, kept = cache.latent ? 1 : linears;
      return {
        layers: kind.layers * layers,
        cache: {
          ...cache,
          values: round(cache.values * kept),
          read: round(cache.read * kept),
          width: round(cache.width * linears),
          step_width: round(cache.step_width * linears),
        },
      };
    }),
    experts: round(m.experts * experts),
    expert_weights: round(m.expert_weights * experts * linears * layers),
  });

  // options.py
  const option = (structure, zeros, values, facts) => {
    const parts = [structure, zeros, values], names = [];
    if (structure.name !== "whole") names.push(structure.name);
    if (zeros.name !== "dense") names.push(`${zeros.name} zeros`);
    if (values.name !== "bf16") names.push(values.name);
    const published = parts.map((part) => facts.compressions[part.loss]);
    return {
      structure, zeros, values,
      name: names.join(" + ") || "as it is",
      changed: names.length,
      stored: `${zeros.name} ${values.name}`,
      bits: values.value_bits * (1 - zeros.sparsity) + zeros.index_bits
        + (values.bits - values.value_bits),
      kept: [0, 1].map((end) => published.reduce((all, one) => all * one.kept[end], 1)),
      sources: published.filter((_, i) => parts[i].loss !== "none").map((one) => one.source),
    };
  };
  const headBits = (c, m, { values }) => values.small_ends
    || (values.name !== "bf16" && outer(m) >= c.large_ends * parameters(m)) ? 8 : 16;
  const optionsFor = (data, device) => {
    const found = [], { structures, zeros, values, engines } = data.parts;
    const named = (parts, name) => parts.find((one) => one.name === name);
    for (const structure of structures) {
      if (structure.experts < 1 && !data.question.model.experts) continue;
      for (const [zero, stored] of Object.entries(engines[device.kind].stored)) {
        if (zero === "2:4" && !device.semi_structured) continue;
        for (const value of stored) {
          if (value === "fp8" && !("fp8" in device.tflops)) continue;
          found.push(option(
            structure, named(zeros, zero), named(values, value), data.question.facts));
        }
      }
    }
    return found;
  };
  const commands = (one, model) => {
    const lines = [];
    let source = model;
    for (const command of [one.structure, one.zeros, one.values].flatMap((part) => part.commands)) {
      lines.push(command.replace("{source}", () => source).replace("{model}", () => model));
      source = command.split("--output ")[1] ?? source;
    }
    return lines;
  };

  // memory.py
  const memoryOf = (data, m, one, kind, batch, context) => {
    const c = data.constants;
    const weights = round(m.linears * one.bits / 8 + outer(m) * headBits(c, m, one) / 8 + m.other * 2);
    const cache = round(batch * heldBytes(c, m, context, kind));
    const chunk = Math.min(c.chunk_tokens, batch * context);
    const working = chunk * (4 * m.hidden + 2 * widest(m)) * 2 + batch * m.vocabulary * 4;
    const overhead = round((weights + cache + working) * c.fragmentation[kind])
      + c.runtime_bytes[kind];
    return { weights, cache, working, overhead, total: weights + cache + working + overhead };
  };

  // speed.py
  const weightsRead = (m, batch) => {
    if (!m.experts) return m.linears;
    const dense = m.linears - m.expert_weights;
    const share = (m.active - dense) / m.expert_weights;
    return dense + m.expert_weights * (1 - (1 - share) ** batch);
  };
  const roofline = (data, device, devices) => {
    const efficiency = data.question.facts.efficiency[device.kind];
    const together = devices * (devices > 1 ? data.constants.parallel_efficiency : 1);
    const computing = (one, operations) => {
      const peak = device.tflops[one.values.product] ?? device.tflops.bf16;
      return map(efficiency.compute, (e) => operations / (peak * 1e12 * together * e));
    };
    const step = (m, one, batch, context) => {
      const gain = one.zeros.decode;
      const linears = weightsRead(m, batch) * (gain ? one.values.bits : one.bits) / 8;
      const rest = m.head * headBits(data.constants, m, one) / 8 + batch * cacheReadBytes(m, context);
      const slower = gain ? map(gain, (factor) => 1 / factor) : exact(1);
      const bandwidth = device.bandwidth_gb_s * 1e9 * together;
      const reached = map(efficiency.bandwidth, (e) => 1 / (bandwidth * e));
      const reading = times(add(scale(slower, linears), exact(rest)), reached);
      const operations = batch * stepOperations(m, context);
      const overhead = scale(efficiency.layer_microseconds, 1e-6 * m.layers);
      return add(larger(reading, computing(one, operations)), overhead);
    };
    const prompt = (m, one, tokens) =>
      larger(computing(one, promptOperations(m, tokens)), step(m, one, 1, 0));
    return { step, prompt };
  };
  const measured = (data) => {
    const { model, times: found } = data.question, spread = data.constants.measured_spread;
    const around = (seconds) => [seconds * (1 - spread), seconds, seconds * (1 + spread)];
    const share = (m) => m.active / model.active;
    return {
      step: (m, one, batch) =>
        around(batch * (found[one.stored].ends + found[one.stored].layers * share(m))),
      prompt: (m, one, tokens) => around(tokens * found[one.stored].prompt * share(m)),
    };
  };

  // capacity.py
  const requestsPerSecond = (load) => load.requests_per_day / 86400 * load.peak;
  const within = (seconds, bound) => bound === null || seconds * 1e3 <= bound;
  const copies = (busy, load) =>
    Math.max(1, Math.ceil(requestsPerSecond(load) * busy / load.utilisation));
  const mostRequests = (busy, load) => load.utilisation / busy / load.peak * 86400;
  const capacityOf = (data, one, device, load) => {
    const m = scaled(data.question.model, one.structure), { gib, shared_by } = data.constants;
    const least = memoryOf(
      data, m, one, device.kind, 1, load.prompt_tokens + load.new_tokens).total;
    const choices = shared_by.filter((n) => n <= device.most && least <= n * device.memory_bytes);
    if (!choices.length) {
      return { tooMuch: `needs ${(least / gib).toFixed(1)} GiB, ${device.most} x `
        + `${(device.memory_bytes / gib).toFixed(1)} GiB are there` };
    }
    const ways = choices.map((devices) => shared(data, m, one, device, load, devices));
    const found = ways.filter((way) => !way.tooMuch);
    return found.length
      ? found.reduce((best, way) => way.devices[1] < best.devices[1] ? way : best) : ways[0];
  };
  const shared = (data, m, one, device, load, devices) => {
    const speed = device.speed(devices), { batches, chunk_tokens } = data.constants;
    const context = load.prompt_tokens + load.new_tokens;
    const memory = (batch) => memoryOf(data, m, one, device.kind, batch, context);
    const fits = batches.filter(
      (b) => b <= device.most_batch && memory(b).total <= devices * device.memory_bytes);
    const first = speed.prompt(m, one, load.prompt_tokens);
    const chunk = speed.prompt(m, one, Math.min(load.prompt_tokens, chunk_tokens));
    const steps = new Map(fits.map((b) => [b, speed.step(m, one, b, context)]));
    const p99 = (b) => b > 1 ? add(steps.get(b), chunk) : steps.get(b);
    const quick = fits.filter((b) => within(p99(b)[1], load.token_ms));
    if (!quick.length || !within(first[1], load.first_token_ms)) {
      const [seconds, words, bound] = within(p99(1)[1], load.token_ms)
        ? [first, "to the first token", load.first_token_ms]
        : [p99(1), "between two tokens (99 of 100)", load.token_ms];
      const least = seconds[1] * 1e3;
      const shown = least >= 100 ? least.toFixed(0) : Number(least.toPrecision(3));
      return { tooMuch: `${shown} ms ${words}, ${bound} allowed` };
    }
    const busyOf = (b) => add(first, scale(steps.get(b), load.new_tokens / b));
    const best = quick.reduce((least, b) => busyOf(b)[1] < busyOf(least)[1] ? b : least);
    const neededAt = (b) => map(busyOf(b), (seconds) => copies(seconds, load));
    const most = String(neededAt(best)), batch = quick.find((b) => String(neededAt(b)) === most);
    const busy = busyOf(batch), needed = neededAt(batch);
    return {
      shared_by: devices, batch, memory: memory(batch), step: steps.get(batch),
      p99: p99(batch), alone: steps.get(1), first_token: first, busy,
      least_busy: busyOf(best),
      replicas: needed[1], devices: scale(needed, devices),
    };
  };

  // money.py
  const costOf = (data, found, load, price) => {
    const c = data.constants, hour = times(found.devices, price);
    const tokens = load.requests_per_day * c.month_days * (load.prompt_tokens + load.new_tokens);
    const month = scale(hour, c.month_hours);
    return { month, year: scale(hour, c.year_hours), million_tokens: scale(month, 1e6 / tokens) };
  };
  const makingOf = (data, one) => {
    const { facts, model } = data.question, c = data.constants;
    const device = facts.hardware[c.pruning_device];
    const steps = [one.structure, one.zeros, one.values].filter((part) => part.takes);
    const seconds = steps.reduce((all, part) => all + facts.pruning_seconds_of_7b[part.takes], 0)
      * parameters(model) / 7e9;
    let hours = exact(seconds / 3600);
    if (one.structure.tokens) {
      const student = scaled(model, one.structure);
      const work = (6 * perToken(student) + 2 * perToken(model)) * one.structure.tokens;
      hours = add(hours, map(facts.training_compute,
        (e) => work / (device.tflops.bf16 * 1e12 * e) / 3600));
    }
    return { gpu_hours: hours, usd: times(hours, device.usd_per_hour) };
  };
  const apiCost = (data, name, api, found, load, price) => {
    const request = (load.prompt_tokens * api.input + load.new_tokens * api.output) / 1e6;
    const least = request ? found.shared_by * price[1] * 24 / request : Infinity;
    return {
      name,
      month: request * load.requests_per_day * data.constants.month_days,
      requests_per_day: least <= mostRequests(found.least_busy[1], load) ? least : null,
    };
  };
  const breakEven = (making, before, after) => {
    const saved = before.month[1] - after.month[1];
    return saved > 0 ? making.usd[1] / saved : null;
  };

  // advice.py
  const percent = (x) => `${(100 * x).toFixed(1)}%`;
  const consider = (data, one, device, need, price) => {
    const found = capacityOf(data, one, device, need.load);
    const making = makingOf(data, one);
    const cost = found.tooMuch ? null : costOf(data, found, need.load, price);
    const floor = need.quality_loss === null ? 0 : 1 - need.quality_loss;
    let refused = found.tooMuch ?? "";
    if (!refused && one.kept[1] < floor) {
      refused = `keeps ${percent(one.kept[0])} to ${percent(one.kept[1])} of the accuracy, `
        + `${percent(floor)} required`;
    } else if (!refused && need.gpu_hours !== null && making.gpu_hours[1] > need.gpu_hours) {
      refused = `takes ${Math.round(making.gpu_hours[1]).toLocaleString("en")} GPU hours to make, `
        + `${need.gpu_hours} allowed`;
    }
    return { option: one, found, making, cost, refused, safe: one.kept[0] >= floor };
  };
  const verdictOn = (chosen, cheaper) => {
    const hint = cheaper.length
      ? ` ${cheaper[0].option.name} would be cheaper and may meet your limits: measure its loss.` : "";
    if (!chosen) return `No option is certain to serve this load within your limits.${hint}`;
    const one = chosen.option;
    if (!one.changed) {
      return `Leave the model as it is: no cheaper option is certain to meet your limits.${hint}`;
    }
    const only = one.structure.name === "whole" && one.zeros.name === "dense";
    let verb = only ? "Only quantize" : one.structure.tokens ? "Distill" : "Prune";
    if (!only && one.values.name !== "bf16") verb += " and quantize";
    if (one.structure.tokens) verb += ` for ${Math.round(chosen.making.usd[1]).toLocaleString("en")} USD once`;
    return `${verb}: ${one.name}.${hint}`;
  };
  const several = (count, name, one = "") => count === 1 ? one + name : `${count} x ${name}`;
  const priced = (name, month) => month >= 1
    ? `${name}: ${Math.round(month).toLocaleString("en")} USD a month`
    : `${name}: under 1 USD a month`;
  const cheapest = (data, others, need) => {
    const found = [];
    const dearer = (a, b) => a.usd_per_hour[1] - b.usd_per_hour[1];
    for (const device of [...others].sort(dearer)) {
      const least = device.usd_per_hour[1] * data.constants.month_hours;
      if (found.some((one) => one.month < least)) break;
      const rows = considered(data, device, need, device.usd_per_hour);
      const row = rows.find((one) => !one.refused && one.safe);
      if (row) {
        found.push({
          device: device.name, devices: row.found.devices[1], option: row.option.name,
          month: row.cost.month[1], step: row.found.step[1],
        });
      }
    }
    return found.reduce((best, one) => best && best.month <= one.month ? best : one, null);
  };
  const insteadOf = (chosen, device, filled, hosted, elsewhere) => {
    const share = filled < 0.01 ? "under 1%" : `${(100 * filled).toFixed(0)}%`, ways = [];
    if (hosted) ways.push(`a hosted model (${priced(hosted.name, hosted.month)})`);
    if (elsewhere) {
      let name = several(elsewhere.devices, elsewhere.device);
      if (elsewhere.option !== "as it is") name += `, ${elsewhere.option}`;
      const speed = `${(1e3 * elsewhere.step).toFixed(0)} ms/token`;
      ways.push(`smaller hardware (${priced(name, elsewhere.month)}, ${speed})`);
    }
    return `This load does not fill a device: it needs ${share} of `
      + `${several(chosen.found.shared_by, device.name, "one ")}. Use ${ways.join(" or ")}.`;
  };
  const monthOf = (row) => row?.cost ? row.cost.month[1] : Infinity;
  const totalOf = (data, row) => row ? monthOf(row) * data.constants.life_months + row.making.usd[1] : Infinity;
  const considered = (data, device, need, price) => {
    const rows = optionsFor(data, device).map((one) => consider(data, one, device, need, price));
    const less = (a, b) => a === b ? 0 : a < b ? -1 : 1;  // Infinity − Infinity is no number
    return rows.sort((a, b) => less(!!a.refused, !!b.refused)
      || less(totalOf(data, a), totalOf(data, b))
      || less(a.option.changed, b.option.changed) || less(-a.option.kept[0], -b.option.kept[0]));
  };
  // device: an entry of facts.hardware with memory_bytes, most, most_batch and speed(devices)
  const adviseOn = (data, device, need, price) => {
    const { least_saving, filled: full, least_usd } = data.constants;
    const rows = considered(data, device, need, price);
    const base = rows.find((row) => !row.option.changed);
    const safe = rows.filter((row) => !row.refused && row.safe);
    let chosen = safe[0] ?? null;
    if (safe.includes(base) && totalOf(data, chosen) > (1 - least_saving) * totalOf(data, base)) {
      chosen = base;
    }
    const dearest = monthOf(chosen);
    const most = totalOf(data, chosen);
    const cheaper = rows.filter((row) => !row.refused && !row.safe && totalOf(data, row) < most);
    const worth = (one) => one && one.month <= dearest - least_usd ? one : null;
    const apis = apisOf(data, chosen, need.load, price);
    const hosted = worth(
      apis.reduce((best, api) => best && best.month <= api.month ? best : api, null));
    const filled = chosen ? need.load.requests_per_day
      / (chosen.found.replicas * mostRequests(chosen.found.least_busy[1], need.load)) : 1;
    const empty = filled < full && chosen?.found.replicas === 1;
    const elsewhere = empty ? worth(cheapest(data, othersThan(data, device), need)) : null;
    let verdict = verdictOn(chosen, cheaper);
    if (empty && (hosted || elsewhere)) {
      verdict = `${insteadOf(chosen, device, filled, hosted, elsewhere)} On this device, `
        + verdict[0].toLowerCase() + verdict.slice(1);
    } else if (hosted) {
      verdict += ` A hosted model costs less (${priced(hosted.name, hosted.month)}): compare.`;
    }
    return {
      rows, base, chosen, cheaper, apis, filled, hosted, elsewhere, verdict,
      paid_back_months: chosen?.cost && base.cost ? breakEven(chosen.making, base.cost, chosen.cost) : null,
    };
  };
  const onPaper = (data, hardware) => {
    const engine = data.parts.engines[hardware.kind], { constants } = data;
    return {
      ...hardware,
      memory_bytes: round(hardware.memory_gib * constants.gib),
      most: engine.shared ? constants.shared_by.at(-1) : 1,
      most_batch: engine.batched ? constants.batches.at(-1) : 1,
      speed: (devices) => roofline(data, hardware, devices),
    };
  };
  const othersThan = (data, device) => Object.values(data.question.facts.hardware)
    .filter((one) => one.memory_gib && one.bandwidth_gb_s && one.tflops.bf16
      && one.name !== device.name && !one.bought === !device.bought)
    .map((one) => onPaper(data, one));
  const deviceOf = (data, name) => {
    const { question } = data;
    if (name !== data.hardware) return onPaper(data, question.facts.hardware[name]);
    const own = { ...onPaper(data, question.hardware), memory_bytes: question.memory_bytes };
    return question.times === null ? own : { ...own, speed: () => measured(data) };
  };
  const apisOf = (data, row, load, price) => row?.cost
    ? Object.entries(data.question.facts.apis)
      .map(([name, api]) => apiCost(data, name, api, row.found, load, price))
    : [];

  return { adviseOn, apisOf, breakEven, capacityOf, commands, consider, deviceOf, mostRequests, optionsFor };
})();
