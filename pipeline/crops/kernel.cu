// All crops of one size, one block each: cut and antialiased resize, flip, colours, blur, solarise. The bytes are those of the
// compiled CPU operator (cpu_operator.py). The text is loops between barriers, so that NVRTC makes a kernel of it and g++ a host
// function that a test can run. Pixels are integers throughout. Doubles make the tables of the resize and the pivot of the
// contrast alone; MUL keeps a compiler from fusing a product and a sum, which would be rounded once instead of twice.
#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t; typedef short int16_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t;
typedef long long int64_t; typedef unsigned long long uint64_t;
#define KERNEL extern "C" __global__ __launch_bounds__(THREADS)
#define DEVICE __device__ __forceinline__
#define EACH(i, n) for (int i = threadIdx.x; i < (n); i += THREADS)
#define BARRIER __syncthreads()
#define ADD(p, v) { uint32_t all = __reduce_add_sync(~0u, v); if (threadIdx.x % 32 == 0) atomicAdd(p, all); } // needs sm_80
#define MUL(a, b) __dmul_rn(a, b)
extern __shared__ __align__(16) uint8_t shared_memory[];
#else // with -ffp-contract=off
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
using std::abs; using std::fabs; using std::floor; using std::fmax; using std::fmin; using std::max; using std::min;
#define KERNEL extern "C"
#define DEVICE inline
#define EACH(i, n) for (int i = 0; i < (n); i++)
#define BARRIER
#define ADD(p, v) (*(p) += (v))
#define MUL(a, b) ((a) * (b))
static struct { int x; } blockIdx;
static uint8_t *shared_memory;
#endif
// cubin.DEFINITIONS has THREADS, STRIP, ONE, SMALL_BLUR, WHITE_FROM, and RED, GREEN and BLUE, the weights of gray.

// What the host knows about a crop: a row of fused.fill_rows, which makes it with the functions of the CPU operator.
struct Crop {
    const uint8_t *image;                    // [height, width, 3]
    int height, width, y0, x0, y1, x1;       // the box lies inside the image
    int y_taps, x_taps;                      // kernels.num_taps
    int flip, solarize, twist;
    float contrast;
    int brightness, brightness_bits;         // of vectors.brighten
    int factor, up, top, rounding, down, matrix[9]; // of vectors.mix
    int reach, weights[1];                   // of the blur, from the middle tap outwards, reach + 1 of them; 0: none
};

// Rows i and size - 1 - i of kernels.filter_table. The weights of one tap for all rows lie next to each other.
DEVICE void filter_rows(int *starts, uint16_t *weights, int i, int length, int size, int taps) {
    double scale = (double)length / size, support = fmax(scale, 1.0), centre = MUL(i + 0.5, scale), total = 0, most = -1;
    int start = min(max((int)(centre - support + 0.5), 0), length - taps), mirror = size - 1 - i, rest = ONE, largest = 0;
    for (int k = 0; k < taps; k++) total += fmax(support - fabs(start + k + 0.5 - centre), 0.0);
    double unit = ONE / total;
    for (int k = 0; k < taps; k++) {
        double exact = fmax(support - fabs(start + k + 0.5 - centre), 0.0);
        int weight = (int)(MUL(exact, unit) + 0.5);
        weights[k * size + i] = min(weight, ONE - 1);
        rest -= weight;
        if (exact > most) { most = exact; largest = k; }
    }
    weights[largest * size + i] = min(weights[largest * size + i] + rest, ONE - 1) & (ONE - 1);
    starts[i] = start;
    if (mirror == i) return;
    starts[mirror] = length - taps - start;
    for (int k = 0; k < taps; k++) weights[(taps - 1 - k) * size + mirror] = weights[k * size + i];
}

// The blur at one place of a line of `size` values, `step` apart, borders mirrored: vectors.weighing, of bytes to shorts with 7
// bits of fraction, or of shorts to bytes. A small blur rounds each product down, as the CPU does in 16 bits.
template <typename T> DEVICE int blurred(const T *line, int place, int step, int size, const int *weights, int reach) {
    const bool bytes = sizeof(T) == 1, small = 2 * reach + 1 <= SMALL_BLUR;
    int drop = !small ? 0 : bytes ? 7 : 14, shift = small ? (bytes ? 1 : 8) : bytes ? 8 : 22;
    uint32_t sum = (1u << (shift - 1)) + (small ? reach : 0);
    for (int k = -reach; k <= reach; k++) {
        int at = abs(place + k);
        at = at < size ? at : 2 * size - 2 - at;
        sum += ((uint32_t)line[at * step] * weights[abs(k)]) >> drop;
    }
    return sum >> shift;
}

// rows: one Crop every `columns` int32, an even number; out: [blocks, S, S, 3] uint8. Each block works in `room` bytes
// (fused.room_bytes) of shared memory or, where that is too small, of `scratch`. The blur's strip replaces the tables.
KERNEL void make_crops(const int *rows, int columns, uint8_t *out, int S, uint8_t *scratch, int64_t room) {
    const Crop *crop = (const Crop *)(rows + (int64_t)blockIdx.x * columns);
    int h = crop->y1 - crop->y0, w = crop->x1 - crop->x0, y_taps = crop->y_taps, x_taps = crop->x_taps, plane = S * S;
    uint8_t *pixels = scratch ? scratch + blockIdx.x * room : shared_memory; // [S, S, 3]
    uint32_t *sums = (uint32_t *)(pixels + ((3 * plane + 15) & ~15));        // of the three channels
    int *pivot = (int *)(sums + 3), *y_starts = pivot + 1, *x_starts = y_starts + S;
    uint16_t *y_weights = (uint16_t *)(x_starts + S), *x_weights = y_weights + y_taps * S, *strip = (uint16_t *)y_starts;
    int half = (S + 1) / 2;
    EACH(i, 2 * half + 3) {
        if (i < half) filter_rows(y_starts, y_weights, i, h, S, y_taps);
        else if (i < 2 * half) filter_rows(x_starts, x_weights, i - half, w, S, x_taps);
        else sums[i - 2 * half] = 0;
    }
    BARRIER;

    // kernels.resize: rows to 7 bits of fraction, then columns. Then vectors.brighten.
    int brightness = crop->brightness, bits = crop->brightness_bits;
    uint32_t totals[3] = {0, 0, 0};
    EACH(i, plane) {
        int y = i / S, x = i % S, sum[3] = {1 << 21, 1 << 21, 1 << 21};
        const uint8_t *corner = crop->image + ((int64_t)(crop->y0 + y_starts[y]) * crop->width + crop->x0 + x_starts[x]) * 3;
        for (int t = 0; t < x_taps; t++) {
            const uint8_t *p = corner + 3 * t;
            int red = 128, green = 128, blue = 128, weight = x_weights[t * S + x];
            for (int k = 0; k < y_taps; k++, p += 3 * crop->width) {
                int share = y_weights[k * S + y];
                red += share * p[0]; green += share * p[1]; blue += share * p[2];
            }
            sum[0] += weight * (red >> 8); sum[1] += weight * (green >> 8); sum[2] += weight * (blue >> 8);
        }
        uint8_t *to = pixels + 3 * (crop->flip ? i - x + S - 1 - x : i);
        for (int c = 0; c < 3; c++) {
            int value = sum[c] >> 22;
            if (crop->twist) value = min(((value * brightness >> 8) + (1 << bits >> 1)) >> bits, 255);
            to[c] = value;
            totals[c] += value;
        }
    }
    if (crop->twist) { // the rest of kernels.twist_colours
        for (int c = 0; c < 3; c++) ADD(sums + c, totals[c]);
        BARRIER;
        EACH(i, 1) {
            const double gray[3] = {RED, GREEN, BLUE};
            double mean = 0;
            for (int c = 0; c < 3; c++) mean += MUL(gray[c], (double)sums[c]) / plane;
            double added = floor(MUL(MUL(mean, 1 - (double)crop->contrast), (double)(128 >> crop->up)) + 0.5);
            *pivot = (int)fmin(fmax(added, 1.0 - ONE), ONE - 1.0);
        }
        BARRIER;
        EACH(i, plane) { // vectors.mix, in its 16 bits
            uint8_t *p = pixels + 3 * i;
            int x[3];
            for (int c = 0; c < 3; c++) {
                int value = (int16_t)((p[c] * crop->factor >> 8) + *pivot);
                x[c] = min(max(value, 0), crop->top) << crop->up;
            }
            for (int c = 0; c < 3; c++) {
                const int *m = crop->matrix + 3 * c;
                int sum = crop->rounding + (x[0] * m[0] >> 16) + (x[1] * m[1] >> 16) + (x[2] * m[2] >> 16);
                p[c] = min(max((int16_t)sum >> crop->down, 0), 255);
            }
        }
    }
    BARRIER;

    // kernels.blur: the columns of a strip of rows, to 7 bits of fraction, then the strip's rows. Without a blur, a copy.
    int reach = crop->reach, line = 3 * S, height = reach ? STRIP : S;
    uint8_t *result = out + (int64_t)blockIdx.x * plane * 3;
    for (int top = 0; top < S; top += height) {
        int count = min(height, S - top) * line;
        if (reach) {
            EACH(i, count) strip[i] = blurred(pixels + i % line, top + i / line, line, S, crop->weights, reach);
            BARRIER;
        }
        EACH(i, count) {
            int x = i % line, value = pixels[top * line + i];
            if (reach) value = blurred(strip + i - x + x % 3, x / 3, 3, S, crop->weights, reach);
            result[top * line + i] = crop->solarize && value >= WHITE_FROM ? 255 - value : value;
        }
        if (reach) BARRIER;
    }
}

#ifndef __CUDACC_RTC__
extern "C" void run_blocks(int blocks, const int *rows, int columns, uint8_t *out, int S, uint8_t *scratch, int64_t room,
                           uint8_t *shared) {
    shared_memory = shared;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) make_crops(rows, columns, out, S, scratch, room);
}
#endif
